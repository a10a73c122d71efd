"""The walk under Triton's interpreter against the recurrence in float64: outputs and all gradients, poisoned memory."""

from __future__ import annotations

import pytest
import torch

from megatron_m1.kernels.lightning.triton_attention import triton_lightning_attention
from tests.kernels.lightning_cases import EXTREME, Case, assert_close, error_by_head, make_case, run, tolerance
from tests.reference.rounded_lightning import rounded_lightning_attention

pytestmark = pytest.mark.usefixtures("nan_memory")
UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""What rounding to the inputs' dtype may be off by, where it is coarser than float32's."""


def compare(case: Case) -> None:
    """The Triton kernels in the case's dtype against ``naive.py`` in float64.

    Allowed is twice the error of the naive form whose operands are rounded to the inputs' dtype and added up in
    float32, plus a floor that does not depend on it, a share of the result's norm: float32's walk over the sums
    (``tolerance``), and for states, which the naive form updates from unrounded operands and the kernels from two
    rounded terms, twice the second term's rounding: u of what rounding to u left.
    """
    expected, actual = run(case.upcast(), "naive"), run(case, "triton")
    assert actual.keys() == expected.keys()
    rounded = rounded_lightning_attention(
        case.q, case.k, case.v, case.slopes, case.lengths, case.initial_state, case.grad_o, case.grad_final_state
    )
    walk = tolerance(torch.float32, sum(case.lengths), max(case.q.shape[2], case.v.shape[2]))
    for name, value in expected.items():
        states = name in ("final_state", "d_initial_state")
        assert actual[name].dtype == (torch.float32 if states else case.q.dtype)
        floor = walk + 2 * UNIT[case.q.dtype] ** 2 if states else walk
        assert_close(name, actual[name], value, floor, 2 * error_by_head(rounded[name], value))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 500, 1000])
def test_one_document_at_extreme_slopes(length: int) -> None:
    compare(make_case([length], dtype=torch.bfloat16, slopes=EXTREME))


@pytest.mark.parametrize("dtype", UNIT, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("states", [False, True], ids=["stateless", "states"])
def test_documents(dtype: torch.dtype, states: bool) -> None:
    compare(make_case([63, 1, 65, 1, 129, 2], dtype=dtype, initial=states, final=states, slopes=EXTREME[:2]))


@pytest.mark.parametrize("dtype", UNIT, ids=["fp32", "bf16", "fp16"])
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


@pytest.mark.parametrize("most", [16, 64, 100])
def test_documents_cut_in_segments(most: int) -> None:
    case = make_case([130, 1, 69], dtype=torch.float32, slopes=EXTREME[:2])
    expected = run(case.upcast(), "naive")
    assert case.initial_state is not None
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.initial_state)]
    q, k, v, state = leaves
    o, final = triton_lightning_attention(q, k, v, case.slopes, case.cu_seqlens, state, True, segment_tokens=most)
    assert final is not None
    results = (o, final)
    gradients = torch.autograd.grad(results, leaves, [case.grad_o, case.grad_final_state])
    for (name, value), actual in zip(expected.items(), (*results, *gradients), strict=True):
        assert_close(name, actual.detach(), value, 4 * tolerance(torch.float32, 200))
