"""The kernels compile for GPUs that are not here: matrix instructions are used, and nothing spills."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_m1.kernels.lightning import triton_launch, triton_walk
from megatron_m1.kernels.lightning.call import Call
from megatron_m1.kernels.lightning.triton_attention import (
    triton_lightning_attention,
    triton_lightning_state,
    triton_silu_attention,
)
from megatron_m1.kernels.triton_aot import CAPABILITIES, ROLES, all_builds, faults, quick_builds, variants


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


def test_at_most_40_configurations_ship() -> None:
    builds = all_builds()
    assert len({build.name for build in builds}) == len(builds)
    assert len({build.configuration for build in builds}) <= 40
    assert {build.configuration for build in quick_builds()} <= {build.configuration for build in builds}


def test_what_is_compiled_quickly() -> None:
    """Each kernel for each architecture, and on sm_90 each role, as a step of training runs it, and its slim form."""
    quick = quick_builds()
    kernels = {"walk", "chain", "step", "forward_row", "backward_rows"}
    assert {(b.kernel, b.capability) for b in quick} == {(k, c) for k in kernels for c in CAPABILITIES}
    roles = {build.role for build in quick if build.kernel == "walk" and build.capability == 90}
    through_silu = {name for name in ROLES if "silu" in name}
    carried = {f"{name} +carries_in" for name in through_silu if "states" not in name}
    assert roles == {*ROLES, *carried, *(f"{name}, slim" for name in ROLES if name not in through_silu)}


class Launches:
    """Runs the walk, and keeps in which variants."""

    def __init__(self) -> None:
        self.seen: set[tuple[bool, ...]] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            named = dict(zip(triton_walk.walk.arg_names, arguments, strict=False)) | constants
            self.seen.add((*(named[flag] for flag in FLAGS), named["stride_a"] == 1))
            triton_walk.walk[grid](*arguments, **constants)

        return launch


FLAGS = tuple(name for name in variants("o")[0] if name != "TRANSPOSED")


def test_every_variant_that_runs_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All calls, whole and in segments, with and without states: the variants launched are those of ``all_builds``."""
    launches = Launches()
    monkeypatch.setattr(triton_launch, "walk", launches)
    x, slopes, bounds = torch.zeros(9, 1, 16).requires_grad_(), torch.ones(1), [0, 3, 9]
    parts = torch.zeros(9, 1, 3, 16).requires_grad_()
    for most in (None, 2):
        for given, kept in itertools.product((False, True), (False, True)):
            state = torch.zeros(2, 1, 16, 16).requires_grad_() if given else None
            o, final = triton_lightning_attention(Call(x, x, x, slopes, (0, 3, 9), state, kept), segment_tokens=most)
            torch.autograd.grad(o.sum(), x, retain_graph=final is not None)
            if final is not None:
                torch.autograd.grad(o.sum() + final.sum(), x)
        states = triton_lightning_state(x, x, slopes, bounds, segment_tokens=most)
        torch.autograd.grad(states.sum(), x)
        o, _ = triton_silu_attention(parts, slopes, bounds, segment_tokens=most)
        torch.autograd.grad(o.sum(), parts)
    compiled = {(*(flags[name] for name in FLAGS), flags["TRANSPOSED"]) for role in ROLES for flags in variants(role)}
    assert launches.seen == compiled


GOOD: dict[str, Any] = dict(
    name="walk", kernel="walk", dtype="torch.bfloat16", dims=[128, 128], capability=90, shared=0, stack=0,
    matrix_instructions=8, multiplies=True,
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
    assert not faults(GOOD | dict(multiplies=False, matrix_instructions=0))
    assert faults(GOOD | change) == [f"walk: {message}"]
