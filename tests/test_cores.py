"""The number of cores is that of the affinity and of the cgroup's quota, not of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_m1.cores import cpu_quota, usable_cores


def test_the_affinity_counts() -> None:
    core = min(os.sched_getaffinity(0))
    program = (
        f"import os; os.sched_setaffinity(0, {{{core}}});"
        "from megatron_m1.cores import usable_cores; print(usable_cores())"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"1\n"
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"jobs/mine": "max 100000"}, None),
        ({"jobs/mine": "250000 100000"}, 3),
        ({"jobs/mine": "50000 100000"}, 1),
        ({"jobs/mine": "max 100000", "jobs": "400000 100000"}, 4),
        ({"jobs/mine": "800000 100000", "jobs": "400000 100000"}, 4),
        ({"": "200000 100000"}, 2),
        ({"jobs/other": "100000 100000"}, None),
    ],
)
def test_the_quota_of_a_cgroup_or_of_one_above(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("12:cpu,cpuacct:/old/hierarchy\n0::/jobs/mine\n")
    for group, content in files.items():
        (tmp_path / "fs" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / group / "cpu.max").write_text(content + "\n")
    assert cpu_quota(tmp_path / "fs", membership) == cores


def test_without_cgroups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "missing") is None
