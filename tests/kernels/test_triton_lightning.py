"""The walk under Triton's interpreter against the recurrence in float64: outputs and all gradients, poisoned memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common.kernel_check import check_kernels, check_timed, shares, silu_shares
from benchmarks.common.lightning_cases import EXTREME, Case, assert_close, make_case, run
from benchmarks.common.tolerances import KERNEL_DTYPES, rounded
from megatron_m1.kernels.lightning import triton_launch, triton_tune
from megatron_m1.kernels.lightning.call import Call
from megatron_m1.kernels.lightning.triton_attention import triton_lightning_attention

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("nan_memory")
DTYPES = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=["fp32", "bf16", "fp16"])


def compare(case: Case) -> None:
    """The Triton kernels against ``naive.py``, by the rule of ``kernel_check.shares``."""
    for name, share in shares(case, truth="naive").items():
        assert share <= 1.0, f"{name}: {share} times the error that is allowed"


@pytest.mark.parametrize("length", [1, 63, 64, 65, 500, 1000])
def test_one_document_at_extreme_slopes(length: int) -> None:
    compare(make_case([length], dtype=torch.bfloat16, slopes=EXTREME))


@DTYPES
@pytest.mark.parametrize("states", [False, True], ids=["stateless", "states"])
def test_documents(dtype: torch.dtype, states: bool) -> None:
    compare(make_case([63, 1, 65, 1, 129, 2], dtype=dtype, initial=states, final=states, slopes=EXTREME[:2]))


@DTYPES
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (64, 128), (128, 64)], ids=lambda dims: f"{dims[0]}x{dims[1]}")
def test_head_dims(dims: tuple[int, int], dtype: torch.dtype) -> None:
    compare(make_case([1, 66], dtype=dtype, slopes=EXTREME[:2], dims=dims))


@pytest.mark.parametrize(
    ("dims", "dtype"),
    [((256, 256), torch.bfloat16), ((128, 256), torch.float16), ((256, 64), torch.float32)],
    ids=["256x256-bf16", "128x256-fp16", "256x64-fp32"],
)
def test_widest_heads(dims: tuple[int, int], dtype: torch.dtype) -> None:
    compare(make_case([66], dtype=dtype, slopes=EXTREME[1:2], dims=dims))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_chunks_of_an_a100(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes an H100's configurations; an A100's have chunks of half the tokens, and other tiles."""
    monkeypatch.setattr(triton_tune, "_capability", lambda device: 80)
    case = make_case([66, 1, 33], dtype=dtype, slopes=EXTREME[:2], dims=(48, 48))
    compare(case)
    parts = torch.stack([case.q, case.k, case.v], dim=2)  # [T, H, 3, D]
    for name, share in silu_shares(parts, case.grad_o, case.slopes, case.lengths).items():
        assert share <= 1.0, f"{name}: {share} times the error that is allowed"


@pytest.mark.parametrize("most", [16, 64, 100])
def test_documents_cut_in_segments(most: int) -> None:
    case = make_case([130, 1, 69], dtype=torch.float32, slopes=EXTREME[:2])
    expected = run(case.upcast(), "naive")
    assert case.initial_state is not None
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.initial_state)]
    q, k, v, state = leaves
    call = Call(q, k, v, case.slopes, tuple(case.cu_seqlens), state, True)
    o, final = triton_lightning_attention(call, segment_tokens=most)
    assert final is not None
    results = (o, final)
    gradients = torch.autograd.grad(results, leaves, [case.grad_o, case.grad_final_state])
    for (name, value), actual in zip(expected.items(), (*results, *gradients), strict=True):
        assert_close(name, actual.detach(), value, rounded(torch.float32, 200, 6))


def test_what_a_benchmark_checks_first() -> None:
    """Compiled kernels go through this on a GPU before they are timed; here interpreted ones do, on small sizes."""
    found = check_kernels(torch.device("cpu"), lengths=[66, 1], heads=2, width=16)
    assert len(found) > 20 and all(share <= 1.0 for share in found.values()), found
    found = check_timed(EXTREME[:2], lengths=[66, 1], width=16)
    assert len(found) == 12 and all(share <= 1.0 for share in found.values()), found


def test_packs_too_small_to_be_drawn_are_refused() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "lightning.py"), "--tokens", "8"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "8 tokens is too small: give at least 256" in run.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_segments_in_16_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rule for whole documents, cut as for a GPU whose processors two heads do not fill."""
    monkeypatch.setattr(triton_launch, "_processors", lambda device: 132)
    case = make_case([130, 1, 70], dtype=dtype, slopes=EXTREME[:2])
    compare(case)
    parts = torch.stack([x[:, :, :5] for x in (case.q, case.k, case.v)], dim=2)  # [T, H, 3, D]
    for name, share in silu_shares(parts, case.grad_o, case.slopes, case.lengths).items():
        assert share <= 1.0, f"{name}: {share} times the error that is allowed"
