"""From one command to N processes: the shape of the launch, torchrun, signals, and one error line for all ranks.

``python -m megatron_m1.launch ARGS`` is torchrun (``torch.distributed.run``) that leaves ``FORWARDED`` to its workers,
so that a run has the time it needs to save; torchrun itself would kill them after 30 seconds.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from megatron_m1.cores import usable_cores
from megatron_m1.launch.slurm import number_of, read_step
from megatron_m1.printing import cut, say_at_once

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Signals that mean: save and exit cleanly. A hang-up that is ignored at the start (``nohup``) stays ignored."""
SAME_PRESS_SECONDS = 0.25
"""Two SIGINT closer together are one request that was sent twice, as GNU timeout does; nobody presses so fast."""
SECOND_INTERRUPT = "megatron-m1: second Ctrl-C: leaving without saving"
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Launch:
    """How many processes run where. Every node starts its own processes."""

    nodes: int
    node_rank: int
    processes_per_node: int
    master_addr: str
    master_port: int | None
    """None lets torchrun pick a free port (one node only)."""

    @property
    def world_size(self) -> int:
        """Processes over all nodes."""
        return self.nodes * self.processes_per_node


def launch_from_environment(
    environ: Mapping[str, str], *, processes: int | None, default_processes: int, visible_gpus: int = 0
) -> Launch:
    """Read the launch from NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and GPUS_PER_NODE, else from SLURM's variables.

    Args:
        environ: the environment.
        processes: processes per node as asked on the command line; it wins over GPUS_PER_NODE.
        default_processes: processes per node when nothing says otherwise.
        visible_gpus: GPUs that this process sees, of which SLURM may count more; 0 is none or unknown.

    Raises:
        ValueError: a variable is no integer, is missing for several nodes, or SLURM starts several tasks a node.
    """
    nodes, node_rank = number_of(environ, "NNODES", minimum=1), number_of(environ, "NODE_RANK", minimum=0)
    # Of nodes that their user numbers, or of a batch script, SLURM knows nothing that matters.
    numbered = nodes is not None and ((nodes > 1 and node_rank is not None) or "SLURM_STEP_ID" not in environ)
    step = None if numbered else read_step(environ)
    nodes = nodes or (step.nodes if step else 1)
    if node_rank is None and (step is not None or nodes == 1):
        node_rank = step.node_rank if step else 0
    if node_rank is None:
        raise ValueError(f"NNODES = {nodes} but NODE_RANK is not set: give every node its number from 0")
    if node_rank >= nodes:
        raise ValueError(f"NODE_RANK = {node_rank} with NNODES = {nodes}: nodes are numbered from 0 to {nodes - 1}")
    per_node = processes or number_of(environ, "GPUS_PER_NODE", minimum=1)
    if per_node is None:
        per_node = number_of(environ, "SLURM_GPUS_ON_NODE", minimum=0) or default_processes
        per_node = min(per_node, visible_gpus or per_node)
    port = number_of(environ, "MASTER_PORT", minimum=1)
    if port is not None and port > 65_535:
        raise ValueError(f"environment variable MASTER_PORT = {port}: ports end at 65535")
    address = environ.get("MASTER_ADDR") or (step.first_node if step else "")
    if nodes > 1:
        if not address:
            raise ValueError(f"NNODES = {nodes} but MASTER_ADDR is not set: give the address of node 0")
        port = port or (step.port if step else 29_500)
    return Launch(nodes, node_rank, per_node, address if nodes > 1 or port else "127.0.0.1", port)


def worker_world_size(environ: Mapping[str, str]) -> int | None:
    """Return the number of processes when torchrun (or its like) has started this one, else None."""
    return number_of(environ, "WORLD_SIZE", minimum=1) if "RANK" in environ else None


def count_gpus() -> int:
    """Return the number of CUDA devices that this process may use; without a device file, don't even import torch."""
    if not list(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return 0
    torch = importlib.import_module("torch")
    count: int = torch.cuda.device_count()
    return count


def torchrun_arguments(launch: Launch) -> list[str]:
    """Return torchrun's own arguments for ``launch``."""
    # No others: torchrun would end its workers, and itself with a traceback, while they save.
    arguments = [f"--nproc-per-node={launch.processes_per_node}", "--signals-to-handle=SIGQUIT"]
    if launch.nodes == 1 and launch.master_port is None:
        return [*arguments, "--standalone", f"--local-addr={launch.master_addr}"]
    return [
        *arguments,
        f"--nnodes={launch.nodes}",
        f"--node-rank={launch.node_rank}",
        f"--master-addr={launch.master_addr or '127.0.0.1'}",
        f"--master-port={launch.master_port}",
    ]


def _check_address(address: str) -> None:
    """Refuse a name that does not exist: torchrun would look for it for a quarter of an hour."""
    try:
        socket.getaddrinfo(address, None)
    except socket.gaierror as error:
        # A name server that does not answer just now may do so when torchrun asks.
        if error.errno != socket.EAI_AGAIN:
            raise ValueError(f"MASTER_ADDR = {address!r} can't be found: give the name or address of node 0") from error


class _Signals:
    """What the launcher does with signals: it passes them on to the workers, and alone tells a second Ctrl-C."""

    def __init__(self, agent: subprocess.Popen[bytes]) -> None:
        self._agent = agent
        self._interrupted_at: float | None = None
        self._passed_on = False
        self.status: int | None = None
        """The exit status when no worker can give one: the agent was killed."""
        self.is_hurried = False
        """Whether a second Ctrl-C has killed it."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        workers = psutil.Process(self._agent.pid).children() if self._agent.poll() is None else []
        if number == signal.SIGINT:
            # The workers can't tell a second Ctrl-C from one that they got besides ours. Without any, all is saved.
            if workers and self._interrupted_at is not None and now - self._interrupted_at > SAME_PRESS_SECONDS:
                self._kill(number)
                self.is_hurried = True
                return
            self._interrupted_at = self._interrupted_at or now
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(number)
        if workers:
            self._passed_on = True
        elif not self._passed_on:
            self._kill(number)

    def _kill(self, number: int) -> None:
        self.status = 128 + number
        self._agent.kill()  # its workers ask the kernel to be killed when it ends


def pause(number: int, frame: FrameType | None) -> None:
    """Stop this process and all below it until it is continued: Ctrl-Z, which workers in sessions of their own miss."""
    family = psutil.Process().children(recursive=True)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    os.kill(os.getpid(), signal.SIGSTOP)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def start_workers(launch: Launch, program: Sequence[str]) -> int:
    """Run ``program`` in this node's processes, pass ``FORWARDED`` on to them and return torchrun's status.

    Args:
        launch: how many processes run where.
        program: what torchrun runs: a script, or ``-m`` and a module, and its arguments.

    Raises:
        ValueError: nothing has the address at which the nodes meet.
    """
    _check_address(launch.master_addr or "127.0.0.1")
    command = [sys.executable, "-m", "megatron_m1.launch", *torchrun_arguments(launch), *program]
    threads = max(1, usable_cores() // launch.processes_per_node)
    heeded = [number for number in FORWARDED if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    # The agent and the workers inherit this. A signal waits until a worker can leave without a traceback, and the agent
    # never gets one.
    signal.pthread_sigmask(signal.SIG_BLOCK, heeded)
    agent = subprocess.Popen(command, env={"OMP_NUM_THREADS": str(threads)} | os.environ)
    signals = _Signals(agent)
    for number in heeded:
        signal.signal(number, signals)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, heeded)
    if signal.getsignal(signal.SIGTSTP) != signal.SIG_IGN:
        signal.signal(signal.SIGTSTP, pause)
    status = agent.wait()
    if signals.is_hurried:
        # Only now: the workers have been killed with the agent, and draw nothing over it any more.
        say_at_once(SECOND_INTERRUPT)
    if signals.status is not None and status < 0:
        return signals.status
    return 128 - status if status < 0 else status


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies: an orphaned rank would keep its GPU and its files."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def prepare_worker() -> None:
    """Give a worker a life of its own, and let signals end it that waited for it or are ignored, nohup's excepted."""
    die_with_parent()
    for number in set(FORWARDED) - {signal.SIGHUP}:
        if signal.getsignal(number) in (signal.SIG_IGN, signal.default_int_handler):
            # Until there is something to save, a signal ends the process; a traceback would help nobody.
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)


def ignore_requests_to_stop() -> None:
    """Ignore ``FORWARDED`` from now on: the run has stopped and saved, and who asked every process may ask again."""
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)


def raised_by_us(error: BaseException) -> bool:
    """Tell whether ``error`` was raised in this package (wrong input) rather than in a library (a fault to trace)."""
    traceback: TracebackType | None = error.__traceback__
    name = ""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return name.partition(".")[0] == "megatron_m1" or name == "__main__"


def report_error(error: ValueError) -> None:
    """Print ``error`` as one line on stderr, once for all ranks.

    Raises:
        ValueError: ``error`` itself, when it comes from a library: that needs its traceback.
    """
    if not raised_by_us(error):
        raise error
    report_once(error)


def report_once(error: Exception, *, name_silent_ranks: bool = False, patience: float = 10.0) -> None:
    """Print ``error`` as one line on stderr, once for all ranks that call this, before any of them leaves.

    Args:
        error: what happened, in the words of this rank.
        name_silent_ranks: add which ranks have reported nothing: in a collective that hangs, those are the cause.
        patience: seconds that the ranks have to come here, since torchrun ends who is left when the first leaves.
    """
    world = worker_world_size(os.environ)
    if world is None or world == 1:
        _print_error(error)
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _report_first(error, world, name_silent_ranks=name_silent_ranks, patience=patience)
    elif os.environ["RANK"] == "0":
        _print_error(error)


def _print_error(error: Exception, addition: str = "") -> None:
    print("megatron-m1: error:", cut(str(error)) + addition, file=sys.stderr, flush=True)


def _report_first(error: Exception, world: int, *, name_silent_ranks: bool, patience: float) -> None:
    """Meet in torchrun's store: the first rank there waits for the others and prints, they wait for it to do so."""
    from torch.distributed import TCPStore

    # When the first leaves, torchrun ends the others: they are about to leave by themselves, with their own status.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"megatron_m1/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store.set(f"{key}/rank/{os.environ['RANK']}", "here")
    is_first = store.add(f"{key}/count", 1) == 1
    deadline = time.monotonic() + (patience if is_first else 2 * patience)
    if not is_first:
        while not store.check([f"{key}/printed"]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return
    while store.add(f"{key}/count", 0) < world and time.monotonic() < deadline:
        time.sleep(0.05)
    silent = [str(rank) for rank in range(world) if not store.check([f"{key}/rank/{rank}"])]
    shown = ", ".join(silent[:8]) + (", ..." if len(silent) > 8 else "")
    _print_error(error, f"; rank {shown} reported nothing: look there first" if silent and name_silent_ranks else "")
    store.set(f"{key}/printed", "yes")


def _meeting_failure(error: Exception, place: str) -> ValueError:
    """Say in one line why the nodes could not meet at ``place``."""
    if "EADDRINUSE" in str(error):
        return ValueError(f"{place}: another program has this port; choose another MASTER_PORT, the same on every node")
    reason = (str(error).splitlines() or [repr(error)])[0]
    return ValueError(f"the nodes could not meet at {place}; check MASTER_ADDR, MASTER_PORT and node 0 ({reason})")


def run_agent(arguments: Sequence[str]) -> int:
    """Be torchrun under ``start_workers``, which has the signals; don't repeat what the workers said.

    Returns:
        0, or the exit status of the worker that failed first.
    """
    die_with_parent()
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main(list(arguments))
    except DistError as error:
        given = dict(word.partition("=")[::2] for word in arguments)
        place = f"{given.get('--master-addr', 'this machine')}, port {given.get('--master-port', '(a free one)')}"
        _print_error(_meeting_failure(error, place))
        return 1
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        killer = signal.Signals(-failure.exitcode).name
        say_at_once(f"megatron-m1: error: rank {rank} was ended by {killer}")
        return 128 - failure.exitcode
    return 0
