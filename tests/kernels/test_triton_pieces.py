"""What surrounds the walk, under the interpreter: states, pieces of documents, SiLU on load, a decode step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common.kernel_check import silu_shares
from benchmarks.common.lightning_cases import EXTREME, assert_close
from benchmarks.common.tolerances import rounded
from megatron_m1.kernels.lightning import (
    lightning_attention,
    lightning_attention_step,
    lightning_state,
    silu_lightning_attention,
    triton_launch,
)
from megatron_m1.kernels.lightning.triton_attention import triton_lightning_state, triton_silu_attention
from megatron_m1.kernels.lightning.walk_plan import NONE, Segment, plan_walk, segment_tokens
from megatron_m1.kernels.rmsnorm import gated_rms_norm

BOUNDS = [0, 70, 71, 200]
SLOPES = EXTREME[:2]
pytestmark = pytest.mark.usefixtures("nan_memory")


def leaves_of(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def compare(op: Callable[..., Any], *leaves: Tensor) -> None:
    """Results and gradients of ``op(*leaves, backend=...)``: kernels in float32 against the recurrence in float64."""
    outcomes = []
    for backend, dtype in (("triton", torch.float32), ("naive", torch.float64)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        results = op(*inputs, backend=backend)
        results = [x for x in (results if isinstance(results, tuple) else (results,)) if x is not None]
        generator = torch.Generator().manual_seed(3)
        grads = [torch.randn(x.shape, generator=generator).to(dtype) for x in results]
        outcomes.append([*results, *torch.autograd.grad(results, inputs, grads)])
    for index, (actual, expected) in enumerate(zip(*outcomes, strict=True)):
        assert actual.dtype == torch.float32
        assert_close(str(index), actual.detach(), expected.detach(), rounded(torch.float32, 200, 24))


def test_state_of_tokens_alone() -> None:
    def op(k: Tensor, v: Tensor, backend: str) -> Any:
        return lightning_state(k, v, SLOPES, cu_seqlens=BOUNDS, backend=backend)

    compare(op, *leaves_of((200, 2, 16), (200, 2, 24)))


def test_state_of_tokens_alone_in_segments() -> None:
    def op(k: Tensor, v: Tensor, backend: str) -> Any:
        if backend == "naive":
            return lightning_state(k, v, SLOPES, cu_seqlens=BOUNDS, backend=backend)
        return triton_lightning_state(k, v, SLOPES, BOUNDS, segment_tokens=48)

    compare(op, *leaves_of((200, 2, 16), (200, 2, 24)))


def test_gradient_through_the_final_state_alone() -> None:
    def op(k: Tensor, v: Tensor, state: Tensor, backend: str) -> Any:
        options: dict[str, Any] = dict(initial_state=state, output_final_state=True, backend=backend)
        return lightning_attention(k, k, v, SLOPES, **options)[1]

    compare(op, *leaves_of((70, 2, 16), (70, 2, 24), (1, 2, 16, 24)))


def test_pieces_make_the_whole() -> None:
    """State of the first tokens alone, then the output from an incoming state: as one walk, with all gradients."""

    def op(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Any:
        if backend == "naive":
            return lightning_attention(q, k, v, SLOPES, backend=backend)[30:]
        state = lightning_state(k[:30], v[:30], SLOPES, backend=backend)
        return lightning_attention(q[30:], k[30:], v[30:], SLOPES, initial_state=state, backend=backend)

    compare(op, *leaves_of((90, 2, 16), (90, 2, 16), (90, 2, 16)))


def test_strided_views() -> None:
    def op(parts: Tensor, backend: str) -> Any:
        q, k, v = parts.split(16, dim=-1)
        return lightning_attention(q, k, v, SLOPES, backend=backend)

    compare(op, *leaves_of((70, 2, 48)))


@pytest.mark.parametrize("name", ["attention", "silu", "norm"])
def test_views_are_read_in_place(name: str) -> None:
    """What is kept for backward of the buffer's size is the buffer itself, and no copy of a part."""
    (parts,) = leaves_of((70, 2, 4, 16))
    q, k, v, gate = parts.unbind(2)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        if name == "attention":
            lightning_attention(q, k, v, SLOPES, backend="triton")
        elif name == "silu":
            silu_lightning_attention(parts, SLOPES, backend="triton")
        else:
            gated_rms_norm(q, torch.ones(32), gate, 1e-6, backend="triton")
    large = {x.untyped_storage().data_ptr() for x in kept if x.numel() >= q.numel()}
    assert large == {parts.untyped_storage().data_ptr()}


@pytest.mark.parametrize("widths", [[16, 16, 16], [16, 16, 24]], ids=["equal", "wider values"])
def test_gradients_of_one_buffer_are_one_buffer(widths: list[int]) -> None:
    (parts,) = leaves_of((70, 2, sum(widths)))
    for views, together in ((parts.split(widths, dim=-1), True), (leaves_of(*((70, 2, n) for n in widths)), False)):
        q, k, v = views
        o = lightning_attention(q, k, v, SLOPES, backend="triton")
        gradients = torch.autograd.grad(o.sum(), tuple(views))
        assert (len({x.untyped_storage().data_ptr() for x in gradients}) == 1) is together
        if together:
            assert [x.storage_offset() for x in gradients] == [x.storage_offset() for x in views]
            assert {x.stride() for x in gradients} == {x.stride() for x in views}


@pytest.mark.parametrize("count", [3, 4], ids=["no gate", "gate"])
def test_silu_on_load_in_one_buffer(count: int) -> None:
    def op(parts: Tensor, backend: str) -> Any:
        o, rest = silu_lightning_attention(parts, SLOPES, cu_seqlens=BOUNDS, backend=backend)
        return (o, rest) if count > 3 else o

    compare(op, *leaves_of((200, 2, count, 16)))


def test_silu_in_segments() -> None:
    """Documents cut in several, as where few heads leave a GPU idle."""

    def op(parts: Tensor, backend: str) -> Any:
        if backend == "naive":
            return silu_lightning_attention(parts, SLOPES, cu_seqlens=BOUNDS, backend=backend)
        return triton_silu_attention(parts, SLOPES, BOUNDS, segment_tokens=48)

    compare(op, *leaves_of((200, 2, 4, 16)))


def test_silu_in_bfloat16() -> None:
    parts, grad = (x.detach().bfloat16() for x in leaves_of((71, 2, 3, 16), (71, 2, 16)))
    for name, share in silu_shares(parts, grad, SLOPES, [70, 1]).items():
        assert share <= 1.0, f"{name}: {share} times the error that is allowed"


def test_one_token_of_each_sequence() -> None:
    def op(q: Tensor, k: Tensor, v: Tensor, state: Tensor, backend: str) -> Any:
        return lightning_attention_step(q, k, v, SLOPES, state, backend=backend)

    compare(op, *leaves_of((3, 2, 16), (3, 2, 16), (3, 2, 40), (3, 2, 16, 40)))


def test_million_token_decays() -> None:
    """What a million tokens leave of a state: nothing, or 2.6e-23 of it; never NaN."""
    k = torch.zeros(1, 3, 16)
    slopes = EXTREME * 2.0**20  # one token that lasts as long as 2^20
    state = torch.full((1, 3, 16, 16), 1e30, requires_grad=True)
    options: dict[str, Any] = dict(initial_state=state, output_final_state=True, backend="triton")
    _, final = lightning_attention(k, k, k, slopes, **options)
    (gradient,) = torch.autograd.grad(final, state, torch.full_like(final, 1e30))
    expected = 1e30 * torch.exp(-slopes.double())
    assert 1e6 < float(expected[1]) < 1e8
    for actual in (final, gradient):
        # The exponent, about 52, is rounded to 2^-19.
        torch.testing.assert_close(actual[0, :, 0, 0].double(), expected, rtol=2.0**-18, atol=0.0)


def test_backward_keeps_only_the_inputs() -> None:
    q, k, v = leaves_of((70, 2, 16), (70, 2, 16), (70, 2, 16))
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        lightning_attention(q, k, v, SLOPES, backend="triton")
    assert sum(kept) == q.numel() + k.numel() + v.numel() + 2


def test_more_segments_than_a_grid_has_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = leaves_of((9, 1, 16), (9, 1, 16), (9, 1, 16))
    bounds = [0, 1, 3, 4, 8, 9]
    whole = lightning_attention(q, k, v, SLOPES[:1], cu_seqlens=bounds, backend="triton")
    monkeypatch.setattr(triton_launch, "MAX_SEGMENTS", 2)
    assert torch.equal(lightning_attention(q, k, v, SLOPES[:1], cu_seqlens=bounds, backend="triton"), whole)


def test_plan_covers_every_token_once() -> None:
    for reverse in (False, True):
        plan = plan_walk((0, 5, 6, 30), True, False, 7, reverse)
        segments = [Segment(*row) for row in plan.segments.tolist()]
        assert sorted(s.state_in for s in segments) == [NONE, NONE, NONE, 0, 1, 2]
        assert {s.state_out for s in segments} == {NONE}
        assert sorted(t for s in segments for t in range(s.start, s.start + s.length)) == list(range(30))
        assert [s.length for s in segments] == [7, 7, 7, 5, 3, 1]
        assert plan.chains.tolist() == [[0, 3]]
        assert [Segment(*row).state_out for row in plan.carries.tolist()] == [0, 1, 2]


def test_whole_documents_where_heads_fill_the_gpu() -> None:
    assert segment_tokens(32768, 128, 132, 1, 64) == 32768
    assert segment_tokens(32768, 100, 132, 1, 64) == 32768


@pytest.mark.parametrize(("programs", "resident"), [(16, 1), (32, 1), (64, 1), (32, 2), (64, 2), (8, 1), (90, 2)])
def test_all_segments_run_at_once_where_heads_are_few(programs: int, resident: int) -> None:
    parts = -(-32768 // segment_tokens(32768, programs, 132, resident, 64))
    assert parts * programs <= 132 * resident < (parts + 1) * programs


X, STATE, NARROW = torch.zeros(3, 1, 16), torch.zeros(3, 1, 16, 16), torch.zeros(3, 1, 4, 16)
WIDE, DOUBLE = torch.zeros(3, 1, 300), X.double()
SLOPE = torch.ones(1)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "keys and values": (
        lambda: lightning_state(X, X[:2], SLOPE),
        r"shapes k \(3, 1, 16\), v \(2, 1, 16\) do not go together: give k \[T, H, Dk\]",
    ),
    "float64": (lambda: lightning_attention(DOUBLE, DOUBLE, DOUBLE, SLOPE, backend="triton"), "no torch.float64"),
    "float64 state": (
        lambda: lightning_state(DOUBLE, DOUBLE, SLOPE, backend="triton"),
        "no torch.float64",
    ),
    "float64 silu": (
        lambda: silu_lightning_attention(NARROW.double(), SLOPE, backend="triton"),
        "no torch.float64",
    ),
    "float64 step": (
        lambda: lightning_attention_step(DOUBLE, DOUBLE, DOUBLE, SLOPE, STATE.double(), backend="triton"),
        "no torch.float64",
    ),
    "float64 norm": (
        lambda: gated_rms_norm(DOUBLE, torch.ones(16).double(), DOUBLE, 1e-6, backend="triton"),
        "no torch.float64",
    ),
    "head dim": (lambda: lightning_attention(WIDE, WIDE, WIDE, SLOPE, backend="triton"), "at most 256"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
