"""The Triton kernels under the interpreter: against the recurrence in float64, all gradients, on poisoned memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_m1.kernels.lightning import (
    layer_slopes,
    lightning_attention,
    lightning_attention_selected,
    lightning_attention_step,
    lightning_state,
    silu_lightning_attention,
)
from megatron_m1.kernels.lightning.segments import plan_walk, segment_tokens
from megatron_m1.kernels.lightning.triton_attention import triton_lightning_attention
from tests.kernels.lightning_cases import Case, assert_close, make_case, run, tolerance

EXTREME = torch.stack([layer_slopes(64, 0, 80)[0], layer_slopes(64, 78, 80)[63], torch.tensor(200.0)])
BOUNDS = [0, 70, 71, 200]
pytestmark = pytest.mark.usefixtures("nan_memory")


def bound(name: str, dtype: torch.dtype, tokens: int) -> float:
    """The relative error allowed: twice that of the recurrence with its operands rounded to ``dtype``.

    With unit roundoff u = 2^-9 (bfloat16) or 2^-12 (float16), the recurrence rounds S or the score that stands for
    it before the product and the result after it: two roundings of at most u make 2 u, and twice that is 4 u. States
    are summed in float32 from operands in two terms, each rounded: u^2. On top comes float32's walk over the sum.
    """
    floor = 4 * tolerance(torch.float32, tokens)
    if dtype == torch.float32:
        return floor
    unit = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-12
    return floor + (4 * unit**2 if name in ("final_state", "d_initial_state") else 4 * unit)


def compare(case: Case) -> None:
    expected, actual = run(case.upcast(), "naive"), run(case, "triton")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(name, actual[name], value, bound(name, case.q.dtype, sum(case.lengths)))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 500, 1000])
def test_one_document(length: int) -> None:
    compare(make_case([length], dtype=torch.bfloat16, slopes=EXTREME if length < 1000 else EXTREME[1:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("states", [False, True], ids=["stateless", "states"])
def test_documents(dtype: torch.dtype, states: bool) -> None:
    case = make_case([63, 1, 65, 1, 129, 2], dtype=dtype, initial=states, final=states, slopes=EXTREME[:2])
    compare(case)


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
        assert_close(name, actual, value, bound(name, torch.float32, 200))


def both(op: Any, *leaves: Tensor) -> None:
    """Results and gradients of ``op(backend)`` on the Triton kernels against torch's operations, both in float32."""
    outcomes = []
    for backend in ("triton", "chunk"):
        results = [x for x in op(backend) if x is not None]
        generator = torch.Generator().manual_seed(3)
        grads = [torch.randn(x.shape, generator=generator) for x in results]
        outcomes.append([*results, *torch.autograd.grad(results, leaves, grads)])
    for index, (actual, expected) in enumerate(zip(*outcomes, strict=True)):
        assert_close(str(index), actual.detach(), expected.detach(), 8 * tolerance(torch.float32, 200))


def leaves_of(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def test_selected_states() -> None:
    q, k, v, states = leaves_of((200, 2, 16), (200, 2, 16), (200, 2, 24), (3, 2, 16, 24))
    options: dict[str, Any] = dict(cu_seqlens=BOUNDS, initial_state=states, initial_index=[2, -1, 0])
    both(
        lambda backend: lightning_attention_selected(
            q, k, v, EXTREME[:2], **options, final_index=[-1, 1, 0], backend=backend
        ),
        q, k, v, states,
    )  # fmt: skip


def test_state_of_tokens_alone() -> None:
    k, v = leaves_of((200, 2, 16), (200, 2, 24))
    both(
        lambda backend: [
            lightning_state(k, v, EXTREME[:2], cu_seqlens=BOUNDS, final_index=[-1, 1, 0], backend=backend)
        ],
        k, v,
    )  # fmt: skip


def test_pieces_make_the_whole() -> None:
    """State of the first tokens alone, then the output from an incoming state: as one walk, with all gradients."""
    q, k, v = leaves_of((90, 2, 16), (90, 2, 16), (90, 2, 16))
    grad = torch.randn(60, 2, 16)
    state = lightning_state(k[:30], v[:30], EXTREME[:2], final_index=[0], backend="triton")
    pieces = lightning_attention(q[30:], k[30:], v[30:], EXTREME[:2], initial_state=state, backend="triton")
    whole = lightning_attention(q, k, v, EXTREME[:2], backend="triton")[30:]
    actual, expected = (torch.autograd.grad(o, (q, k, v), grad) for o in (pieces, whole))
    for name, a, e in zip(("o", "dq", "dk", "dv"), (pieces, *actual), (whole, *expected), strict=True):
        assert_close(name, a.detach(), e.detach(), 8 * tolerance(torch.float32, 90))


def test_silu_on_load_in_one_buffer() -> None:
    (parts,) = leaves_of((200, 2, 4, 16))
    both(lambda backend: silu_lightning_attention(parts, EXTREME[:2], cu_seqlens=BOUNDS, backend=backend), parts)


def test_strided_views_are_read_in_place() -> None:
    (parts,) = leaves_of((70, 2, 48))
    q, k, v = parts.split(16, dim=-1)
    both(lambda backend: [lightning_attention(q, k, v, EXTREME[:2], backend=backend)], parts)


def test_one_token_of_each_sequence() -> None:
    q, k, v, state = leaves_of((3, 2, 16), (3, 2, 16), (3, 2, 40), (3, 2, 16, 40))
    both(
        lambda backend: lightning_attention_step(q, k, v, EXTREME[:2], state, backend=backend),
        q, k, v, state,
    )  # fmt: skip


def test_million_token_decays_stay_finite() -> None:
    """What a million tokens leave of a state: nothing, or 3e-23 of it, never NaN."""
    k, v = (torch.zeros(1, 3, 16) for _ in range(2))
    slopes = EXTREME * 2.0**20  # one token that lasts as long as 2^20
    state = torch.full((1, 3, 16, 16), 1e30)
    _, final = lightning_attention(k, k, v, slopes, initial_state=state, output_final_state=True, backend="triton")
    assert bool(final.isfinite().all())


def test_backward_keeps_only_the_inputs() -> None:
    q, k, v = leaves_of((70, 2, 16), (70, 2, 16), (70, 2, 16))
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        lightning_attention(q, k, v, EXTREME[:2], backend="triton")
    assert sum(kept) == q.numel() + k.numel() + v.numel() + 2


def test_plan_covers_every_token_once() -> None:
    for reverse in (False, True):
        plan = plan_walk([0, 5, 6, 30], [0, -1, 1], [-1, 0, 1], 7, reverse)
        tokens = sorted(t for s in plan.segments for t in range(s.start, s.start + s.length))
        assert tokens == list(range(30))
        assert plan.chains == [(0, 3)]
        assert [s.state_out for s in plan.carries] == [0, 1, 2]


def test_whole_documents_where_heads_fill_the_gpu() -> None:
    assert segment_tokens(32768, 128, 132, 64) == 32768
    assert segment_tokens(32768, 16, 132, 64) == 3648


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(dtype=torch.float64), "float64"),
        (dict(width=300), "at most 256"),
        (dict(final_index=[1]), "number the 1 states"),
        (dict(final_index=[0, 1]), "each of 1 documents"),
    ],
)
def test_what_is_refused(call: dict[str, Any], message: str) -> None:
    x = torch.zeros(3, 1, call.pop("width", 16), dtype=call.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match=message):
        lightning_attention_selected(x, x, x, EXTREME[:1], **call, backend="triton")
