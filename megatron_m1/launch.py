"""From one command to N processes: the shape of the launch, torchrun, signals, and one error line for all ranks.

``python -m megatron_m1.launch ARGS`` is torchrun (``torch.distributed.run``) that leaves SIGTERM, SIGUSR1 and SIGINT to
its workers, so that a run has the time it needs to save; torchrun itself would kill them after 30 seconds.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from megatron_m1.data.cores import usable_cores
from megatron_m1.printing import guard_streams, keep_output

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that mean: save and exit cleanly."""
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


def _integer(environ: Mapping[str, str], names: Sequence[str], *, minimum: int) -> int | None:
    """Return the first of the variables ``names`` that is set, as an integer."""
    for name in names:
        text = environ.get(name, "").strip()
        if not text:
            continue
        if not re.fullmatch(r"\d+", text) or int(text) < minimum:
            raise ValueError(f"environment variable {name} = {text!r}: give an integer of at least {minimum}")
        return int(text)
    return None


def first_host(node_list: str) -> str:
    """Return the first host of a SLURM node list, e.g. ``gpu[07-12,20],cpu1`` -> ``gpu07``."""
    depth = 0
    for end, character in enumerate(node_list):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            node_list = node_list[:end]
            break
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", node_list)


def launch_from_environment(environ: Mapping[str, str], *, processes: int | None, default_processes: int) -> Launch:
    """Read the launch from NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and GPUS_PER_NODE, else from SLURM's variables.

    Args:
        environ: the environment.
        processes: processes per node as asked on the command line; it wins over GPUS_PER_NODE.
        default_processes: processes per node when nothing says otherwise.

    Raises:
        ValueError: a variable is no integer, is missing for several nodes, or SLURM starts several tasks a node.
    """
    nodes = _integer(environ, ["NNODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"], minimum=1) or 1
    node_rank = _integer(environ, ["NODE_RANK", "SLURM_NODEID"], minimum=0)
    if node_rank is None:
        if nodes > 1:
            raise ValueError(f"NNODES = {nodes} but NODE_RANK is not set: give every node its number from 0")
        node_rank = 0
    if node_rank >= nodes:
        raise ValueError(f"NODE_RANK = {node_rank} with NNODES = {nodes}: nodes are numbered from 0 to {nodes - 1}")
    tasks = environ.get("SLURM_NTASKS_PER_NODE", "1")
    if "SLURM_STEP_ID" in environ and tasks != "1":
        raise ValueError(
            f"SLURM starts {tasks} tasks a node: use srun --ntasks-per-node=1, each starts its own processes"
        )
    per_node = processes or _integer(environ, ["GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"], minimum=1) or default_processes
    port = _integer(environ, ["MASTER_PORT"], minimum=1)
    address = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_JOB_NODELIST", ""))
    if nodes > 1:
        if not address:
            raise ValueError(f"NNODES = {nodes} but MASTER_ADDR is not set: give the address of node 0")
        job = _integer(environ, ["SLURM_JOB_ID"], minimum=0)
        port = port or (20_000 + job % 20_000 if job is not None else 29_500)
    return Launch(nodes, node_rank, per_node, address if nodes > 1 or port else "127.0.0.1", port)


def worker_world_size(environ: Mapping[str, str]) -> int | None:
    """Return the number of processes when torchrun (or its like) has started this one, else None."""
    return _integer(environ, ["WORLD_SIZE"], minimum=1) if "RANK" in environ else None


def count_gpus() -> int:
    """Return the number of CUDA devices that this process may use; without a device file, don't even import torch."""
    if not list(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return 0
    torch = importlib.import_module("torch")
    count: int = torch.cuda.device_count()
    return count


def torchrun_arguments(launch: Launch) -> list[str]:
    """Return torchrun's own arguments for ``launch``."""
    # Not SIGTERM or SIGINT: torchrun would end its workers, and itself with a traceback, while they save.
    arguments = [f"--nproc-per-node={launch.processes_per_node}", "--signals-to-handle=SIGHUP,SIGQUIT"]
    if launch.nodes == 1 and launch.master_port is None:
        return [*arguments, "--standalone", f"--local-addr={launch.master_addr}"]
    return [
        *arguments,
        f"--nnodes={launch.nodes}",
        f"--node-rank={launch.node_rank}",
        f"--master-addr={launch.master_addr or '127.0.0.1'}",
        f"--master-port={launch.master_port}",
    ]


def start_workers(launch: Launch, program: Sequence[str]) -> int:
    """Run ``program`` in this node's processes, pass SIGTERM, SIGUSR1 and SIGINT on to them, return torchrun's status.

    Args:
        launch: how many processes run where.
        program: what torchrun runs: a script, or ``-m`` and a module, and its arguments.
    """
    command = [sys.executable, "-m", "megatron_m1.launch", *torchrun_arguments(launch), *program]
    threads = max(1, usable_cores() // launch.processes_per_node)
    agent = subprocess.Popen(command, env={"OMP_NUM_THREADS": str(threads)} | os.environ)

    def forward(number: int, _frame: FrameType | None) -> None:
        workers = psutil.Process(agent.pid).children() if agent.poll() is None else []
        for worker in workers:
            worker.send_signal(number)
        if not workers:
            agent.kill()

    for number in FORWARDED:
        signal.signal(number, forward)
    status = agent.wait()
    return 128 - status if status < 0 else status


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies: an orphaned rank would keep its GPU and its files."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def prepare_worker() -> None:
    """Undo in a worker what it inherits from the agent: ignored signals, and a life of its own."""
    die_with_parent()
    for number in FORWARDED:
        if signal.getsignal(number) in (signal.SIG_IGN, signal.default_int_handler):
            # Until there is something to save, a signal ends the process; a traceback would help nobody.
            signal.signal(number, signal.SIG_DFL)


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
    print("megatron-m1: error:", " ".join(str(error).split()) + addition, file=sys.stderr, flush=True)


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


def run_agent(arguments: Sequence[str]) -> int:
    """Be torchrun, but ignore the signals that the parent passes on to the workers, and don't repeat what they said.

    Returns:
        0, or the exit status of the worker that failed first.
    """
    die_with_parent()
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main(list(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        killer = signal.Signals(-failure.exitcode).name
        print(f"megatron-m1: error: rank {rank} was ended by {killer}", file=sys.stderr, flush=True)
        return 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    guard_streams()
    keep_output()
    sys.exit(run_agent(sys.argv[1:]))
