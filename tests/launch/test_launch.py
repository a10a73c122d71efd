"""From the environment to a launch, and the example script as bash, as Python and under torchrun."""

from __future__ import annotations

import ast
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_m1.config.fields import field_types
from megatron_m1.launch import (
    SAME_PRESS_SECONDS,
    Launch,
    launch_from_environment,
    start_workers,
    torchrun_arguments,
    worker_world_size,
)
from megatron_m1.launch.slurm import first_host, tasks_per_node

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain_m1.sh"


def test_nothing_set_is_one_node() -> None:
    launch = launch_from_environment({}, processes=None, default_processes=2)
    assert launch == Launch(1, 0, 2, "127.0.0.1", None)
    assert torchrun_arguments(launch) == [
        *["--nproc-per-node=2", "--signals-to-handle=SIGQUIT"],
        *["--standalone", "--local-addr=127.0.0.1"],
    ]


def test_the_environment_of_a_cluster() -> None:
    environ = {
        "NNODES": "4",
        "NODE_RANK": "3",
        "MASTER_ADDR": "head",
        "MASTER_PORT": "1234",
        "GPUS_PER_NODE": "8",
        "SLURM_NNODES": "9",
        "SLURM_NODEID": "8",
    }
    launch = launch_from_environment(environ, processes=None, default_processes=1)
    assert launch == Launch(4, 3, 8, "head", 1234)
    assert launch.world_size == 32
    assert torchrun_arguments(launch) == [
        *["--nproc-per-node=8", "--signals-to-handle=SIGQUIT", "--nnodes=4", "--node-rank=3"],
        *["--master-addr=head", "--master-port=1234"],
    ]


def test_the_command_line_wins_over_gpus_per_node() -> None:
    assert launch_from_environment({"GPUS_PER_NODE": "8"}, processes=3, default_processes=1).processes_per_node == 3


def test_the_environment_of_slurm() -> None:
    environ = {
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "1",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_JOB_ID": "123456",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS_PER_NODE": "1",
    }
    launch = launch_from_environment(environ, processes=None, default_processes=1)
    assert launch == Launch(2, 1, 4, "gpu07", 20_000 + 123456 % 20_000)


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_NNODES": "4", "SLURM_NTASKS": "32"}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        # srun --nodes=2 --nodelist=n3,n4: it meets at its own first node, at a port of its own.
        (
            {"SLURM_STEP_ID": "1", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "n[3-4]"}
            | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
            Launch(2, 1, 6, "n3", 20_108),
        ),
        # salloc's interactive step on one of the job's nodes
        (
            {"SLURM_STEP_ID": "4294967290", "SLURM_NTASKS_PER_NODE": "8", "SLURM_STEP_NUM_TASKS": "1"}
            | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "0"},
            Launch(1, 0, 6, "127.0.0.1", None),
        ),
        # the batch script of a job on one node
        ({"SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NODEID": "0"}, Launch(1, 0, 6, "127.0.0.1", None)),
        # a user who numbers the nodes
        (
            {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "head"},
            Launch(3, 2, 6, "head", 29_500),
        ),
        (
            {"NNODES": "32", "NODE_RANK": "9", "MASTER_ADDR": "head", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1"},
            Launch(32, 9, 6, "head", 29_500),
        ),
    ],
)
def test_slurms_steps(step: dict[str, str], expected: Launch) -> None:
    assert launch_from_environment(JOB | step, processes=None, default_processes=6) == expected


def test_no_more_processes_than_gpus_that_a_task_sees() -> None:
    for counted, visible, started in (("8", 2, 2), ("2", 8, 2), ("0", 0, 1), ("8", 0, 8)):
        environ = {"SLURM_GPUS_ON_NODE": counted}
        launch = launch_from_environment(environ, processes=None, default_processes=1, visible_gpus=visible)
        assert launch.processes_per_node == started


def test_tasks_per_node() -> None:
    assert tasks_per_node("4") == [4]
    assert tasks_per_node("2(x3),1,3(x2)") == [2, 2, 2, 1, 3, 3]


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-012,20],cpu1", "gpu007"),
        ("rack[2-3]n[4,6]", "rack2n4"),
        ("n[1-2]-ib,n9-ib", "n1-ib"),
        ("", ""),
    ],
)
def test_first_host_of_a_node_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NNODES": "two"}, "NNODES = 'two'"),
        ({"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE = '0'"),
        ({"NNODES": "2"}, "NODE_RANK is not set"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK = 2 with NNODES = 2"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "8"}, "8 tasks a node"),
        ({"SLURM_STEP_ID": "0", "SLURM_NNODES": "1", "SLURM_STEP_NUM_TASKS": "4"}, "4 tasks a node"),
        ({"SLURM_STEP_ID": "0", "SLURM_NNODES": "2", "SLURM_NTASKS": "3"}, "2 tasks a node"),
        ({"SLURM_STEP_ID": "0", "SLURM_NNODES": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x2),2"}, "2 tasks a node"),
        ({"SLURM_STEP_ID": "0", "SLURM_LOCALID": "3"}, "4 tasks a node"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "x"}, "SLURM_STEP_TASKS_PER_NODE = 'x'"),
        ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NODEID": "0"}, "runs on the first alone: start it by srun"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NUM_TASKS": "2"}, "2 tasks on 4 nodes"),
        ({"SLURM_STEP_ID": "0", "NNODES": "1", "NODE_RANK": "0", "SLURM_STEP_NUM_TASKS": "2"}, "2 tasks a node"),
        ({"SLURM_STEP_ID": "0", "SLURM_HET_SIZE": "2"}, "heterogeneous"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT = 65536: ports end at 65535"),
        ({"NNODES": "1" * 5000}, "NNODES = "),
    ],
)
def test_a_wrong_environment_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        launch_from_environment(environ, processes=None, default_processes=1)


def test_the_world_of_a_worker() -> None:
    assert worker_world_size({"RANK": "1", "WORLD_SIZE": "4"}) == 4
    assert worker_world_size({"WORLD_SIZE": "4"}) is None


def test_torchrun_leaves_every_option_to_the_script() -> None:
    from torch.distributed.run import parse_args

    own = [
        "--config",
        "--preset",
        "--nproc-per-node",
        "--dry-run",
        "--world-size",
        "--device",
        "--help",
        "--resume",
        "--no-resume",
    ]
    ours = own + [f"--{path}" for path in field_types()]
    for before in (["--nproc-per-node=2", str(SCRIPT)], ["--standalone", "-m", "megatron_m1.cli", "pretrain"]):
        arguments = [word for option in ours for word in (option, "x")]
        parsed = parse_args([*before, *arguments])
        assert parsed.training_script_args[-len(arguments) :] == arguments


def run_script(*command: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout, outside of any launcher, with the environment of a machine without GPUs."""
    inherited = {
        k: v for k, v in os.environ.items() if not re.match("SLURM_|(NNODES|NODE_RANK|MASTER_.*|WORLD_SIZE|RANK)$", k)
    }
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environ,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_script_is_valid_bash_and_valid_python() -> None:
    header, *python = ast.parse(SCRIPT.read_text()).body
    assert isinstance(header, ast.Expr)
    assert python
    assert run_script("bash", "-n", SCRIPT).stderr == ""
    assert run_script("bash", "-n", ROOT / "examples" / "pretrain_m1.sbatch").stderr == ""


def test_bash_plans_two_cpu_processes_by_itself(tmp_path: Path) -> None:
    flags = ["--dry-run", "--train.max_steps", 5, "--run.folder", tmp_path / "run", "--device", "cpu"]
    done = run_script("bash", SCRIPT, *flags, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stderr) == (0, "")
    assert "world       2 processes (1 node x 2)" in done.stdout
    assert "steps       5 =" in done.stdout
    assert f"run folder  {tmp_path / 'run'}" in done.stdout


def test_bash_refuses_before_any_worker_starts(tmp_path: Path) -> None:
    flags = ["--parallel.tensor_model_parallel_size", 2, "--run.folder", tmp_path]
    done = run_script("bash", SCRIPT, *flags, CUDA_VISIBLE_DEVICES="", GPUS_PER_NODE="3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("megatron-m1: error: the mesh does not divide the world: tensor 2 x")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_under_torchrun_one_rank_speaks_and_all_leave_with_2(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    flags = ["--run.folder", tmp_path, "--train.max_steps", 5, "--parallel.tensor_model_parallel_size", 3]
    done = run_script(*torchrun, "--nproc-per-node", 2, SCRIPT, *flags, CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert re.findall("megatron-m1: error: .*", done.stderr) == [
        "megatron-m1: error: the mesh does not divide the world: tensor 3 x context 1 x pipeline 1 = 3 ranks, "
        "but there are 2 processes; start a multiple of 3 or make the mesh smaller"
    ]
    assert re.findall(r"exitcode  : (\d+)", done.stderr) == ["2", "2"]


LAUNCH_TWO = (
    "import sys; from megatron_m1.launch import Launch, start_workers;"
    "sys.exit(start_workers(Launch(1, 0, 2, '127.0.0.1', None), sys.argv[1:]))"
)


@pytest.fixture
def two_waiting_workers(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """A launcher that leads a process group, and its two workers that wait for SIGTERM."""
    with (tmp_path / "stderr").open("wb") as stderr:
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCH_TWO, str(ROOT / "tests" / "launch" / "waiting_worker.py"), str(tmp_path)],
            process_group=0,
            stderr=stderr,
        )
    ready = [tmp_path / f"{rank}.ready" for rank in range(2)]
    deadline = time.monotonic() + 120
    while not all(file.exists() for file in ready):
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = [psutil.Process(int(file.read_text())) for file in ready]
    yield launcher, workers
    for process in workers:
        if process.is_running():
            process.kill()
    launcher.kill()
    launcher.wait()


@pytest.mark.slow
def test_a_busy_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program = LAUNCH_TWO.replace("'127.0.0.1', None", f"'127.0.0.1', {port}")
        done = run_script(sys.executable, "-c", program, ROOT / "tests" / "launch" / "waiting_worker.py", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"megatron-m1: error: 127\.0\.0\.1, port {port}: another program has this .*\n", done.stderr)


def test_a_node_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"MASTER_ADDR = 'a name with spaces' can't be found"):
        start_workers(Launch(2, 1, 1, "a name with spaces", 29_500), [])


@pytest.mark.slow
def test_sigterm_reaches_the_workers_and_they_leave_in_peace(
    two_waiting_workers: tuple[subprocess.Popen[bytes], list[psutil.Process]], tmp_path: Path
) -> None:
    launcher, _ = two_waiting_workers
    launcher.terminate()
    assert launcher.wait(60) == 0
    assert sorted(file.name for file in tmp_path.glob("*.saved")) == ["0.saved", "1.saved"]


@pytest.mark.slow
def test_sigterm_to_the_whole_process_group_ends_as_quietly(
    two_waiting_workers: tuple[subprocess.Popen[bytes], list[psutil.Process]], tmp_path: Path
) -> None:
    launcher, _ = two_waiting_workers
    os.killpg(launcher.pid, signal.SIGTERM)
    assert launcher.wait(60) == 0
    assert sorted(file.name for file in tmp_path.glob("*.saved")) == ["0.saved", "1.saved"]
    assert (tmp_path / "stderr").read_text() == ""


@pytest.mark.slow
def test_ctrl_c_before_anything_can_be_saved_is_one_line(
    two_waiting_workers: tuple[subprocess.Popen[bytes], list[psutil.Process]], tmp_path: Path
) -> None:
    launcher, _ = two_waiting_workers
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(60) == 130
    said = (tmp_path / "stderr").read_text()
    assert re.fullmatch(r"megatron-m1: error: rank [01] was ended by SIGINT\n", said), said


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once(
    two_waiting_workers: tuple[subprocess.Popen[bytes], list[psutil.Process]], tmp_path: Path
) -> None:
    """A first one reaches the workers, which take their time; two at once are one request."""
    launcher, workers = two_waiting_workers
    for process in workers:
        process.suspend()
    launcher.send_signal(signal.SIGINT)
    launcher.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        launcher.wait(2 * SAME_PRESS_SECONDS)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(60) == 128 + signal.SIGINT
    assert "second Ctrl-C: leaving without saving" in (tmp_path / "stderr").read_text()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []


def wait_for_status(processes: list[psutil.Process], is_stopped: bool) -> None:
    """Wait until all of them are stopped, or none is."""
    deadline = time.monotonic() + 60
    while any((process.status() == psutil.STATUS_STOPPED) != is_stopped for process in processes):
        assert time.monotonic() < deadline, [process.status() for process in processes]
        time.sleep(0.02)


@pytest.mark.slow
def test_ctrl_z_stops_the_workers_as_well(
    two_waiting_workers: tuple[subprocess.Popen[bytes], list[psutil.Process]], tmp_path: Path
) -> None:
    launcher, workers = two_waiting_workers
    family = [psutil.Process(launcher.pid), *workers]
    for _ in range(2):
        launcher.send_signal(signal.SIGTSTP)
        wait_for_status(family, True)
        launcher.send_signal(signal.SIGCONT)
        wait_for_status(family, False)
    launcher.terminate()
    assert launcher.wait(60) == 0
    assert sorted(file.name for file in tmp_path.glob("*.saved")) == ["0.saved", "1.saved"]


@pytest.mark.slow
def test_workers_die_with_a_killed_launcher(
    two_waiting_workers: tuple[subprocess.Popen[bytes], list[psutil.Process]], tmp_path: Path
) -> None:
    launcher, workers = two_waiting_workers
    launcher.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
    assert list(tmp_path.glob("*.saved")) == []
