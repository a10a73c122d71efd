"""The kernels compile for GPUs that are not here: matrix instructions are used, and nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from megatron_m1.kernels.triton_aot import CAPABILITIES, all_builds, faults, quick_builds


@pytest.mark.timeout(600)
def test_kernels_compile() -> None:
    """In a process of its own: here the interpreter has taken the kernels' place."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "megatron_m1.kernels.triton_aot", "--jobs", "2"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert [result["name"] for result in results] == [build.name for build in quick_builds()]
    assert not [fault for result in results for fault in faults(result)]
    assert all(result["stack"] == 0 for result in results)


def test_what_is_compiled() -> None:
    """At most 40; among the quick ones each kernel for each architecture, and on sm_90 each role and its slim form."""
    quick, names = quick_builds(), [build.name for build in all_builds()]
    assert len(names) == len(set(names)) <= 40
    kernels = {"walk", "chain", "step", "forward_row", "backward_rows"}
    assert {(b.kernel, b.capability) for b in quick} == {(k, c) for k in kernels for c in CAPABILITIES}
    roles = {build.role for build in quick if build.kernel == "walk" and build.capability == 90}
    assert roles == {
        *(
            f"{name}{slim}"
            for name in ("output", "reverse", "states", "silu output", "silu dk")
            for slim in ("", ", slim")
        ),
        *("silu dq", "silu dv"),
    }


GOOD: dict[str, Any] = dict(
    name="walk", kernel="walk", dtype="torch.bfloat16", dims=[128, 128], capability=90, shared=0, stack=0,
    matrix_instructions=8,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(stack=8), "spills 8 bytes"),
        (dict(matrix_instructions=0), "no wgmma.mma_async"),
        (dict(shared=228 * 1024, dtype="torch.float32"), "233472 bytes of shared memory"),
    ],
)
def test_faults_are_found(change: dict[str, Any], message: str) -> None:
    assert not faults(GOOD)
    assert not faults(GOOD | dict(dims=[256, 256], stack=8))
    assert faults(GOOD | change) == [f"walk: {message}"]
