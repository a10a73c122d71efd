"""The kernels compile for GPUs that are not here: matrix instructions are used, and nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megatron_m1.kernels.triton_aot import all_builds, quick_builds

INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What one program may have (CUDA programming guide, technical specifications per compute capability)."""


@pytest.mark.timeout(600)
def test_shipped_kernels_compile() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "megatron_m1.kernels.triton_aot", "--jobs", "2"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert [result["name"] for result in results] == [build.name for build in quick_builds()]
    for result in results:
        assert result["shared"] <= SHARED_BYTES[result["capability"]], result
        if result["kernel"] == "walk":
            assert result["stack"] == 0, result
            assert result[INSTRUCTION[result["capability"]]] > 0, result


def test_few_configurations_ship() -> None:
    builds = all_builds()
    names = [build.name for build in builds]
    assert len(set(names)) == len(names)
    assert sum(build.kernel == "walk" for build in builds) <= 40
