"""Lightning attention: the recurrence against the dense form, the chunked form against the recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common.lightning_cases import Case, assert_close, make_case, run
from benchmarks.common.tolerances import rounded
from megatron_m1.kernels.lightning import (
    choose_backend,
    layer_slopes,
    lightning_attention,
    lightning_attention_step,
)
from megatron_m1.kernels.lightning.call import Call
from megatron_m1.kernels.lightning.chunk import chunk_lightning_attention
from megatron_m1.kernels.rmsnorm import gated_rms_norm
from megatron_m1.layers.lightning import LightningCache
from tests.reference.dense_lightning import dense_lightning_attention

SINGLE = [[length] for length in (1, 63, 64, 65, 500, 1000)]
PACKS = [
    [1, 1, 62, 1, 64],
    [63, 65, 1, 129, 2],
    [5, 195, 1, 63, 236],
    [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 58, 9, 7, 9, 32, 3, 84, 6, 2, 64, 3],
    [128, 64, 500, 308],
]
EXTREME = torch.stack(
    [layer_slopes(64, 0, 80)[0], layer_slopes(64, 78, 80)[63], torch.tensor(0.0), torch.tensor(200.0)]
)


def name_of(lengths: list[int]) -> str:
    return "-".join(map(str, lengths[:5])) + ("..." if len(lengths) > 5 else "")


def compare(case: Case, relative: float) -> None:
    """The chunked form in the case's dtype against the recurrence in float64."""
    expected, actual = run(case.upcast(), "naive"), run(case, "chunk")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # States stay float32 when the inputs are bfloat16, so they are held to float32's bound.
        is_state = name in ("final_state", "d_initial_state")
        bound = rounded(torch.float32, sum(case.lengths)) if is_state and case.q.dtype == torch.bfloat16 else relative
        assert_close(name, actual[name], value, bound)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("lengths", SINGLE + PACKS, ids=name_of)
@pytest.mark.parametrize(("initial", "final"), [(False, False), (True, True)], ids=["stateless", "states"])
def test_chunk_equals_recurrence(lengths: list[int], initial: bool, final: bool) -> None:
    compare(make_case(lengths, initial=initial, final=final), rounded(torch.float64, sum(lengths)))


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(("initial", "final"), [(True, False), (False, True)], ids=["initial", "final"])
def test_chunk_with_one_kind_of_state(initial: bool, final: bool) -> None:
    lengths = PACKS[1]
    compare(make_case(lengths, initial=initial, final=final), rounded(torch.float64, sum(lengths)))


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("lengths", [[1], [65], [1000], PACKS[2], PACKS[3]], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_chunk_in_low_precision(lengths: list[int], dtype: torch.dtype) -> None:
    compare(make_case(lengths, dtype=dtype), rounded(dtype, sum(lengths)))


@pytest.mark.parametrize("lengths", [[500], PACKS[1]], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_extreme_slopes(lengths: list[int], dtype: torch.dtype) -> None:
    compare(make_case(lengths, dtype=dtype, slopes=EXTREME), rounded(dtype, sum(lengths)))


@pytest.mark.parametrize("chunk_size", [1, 7, 100, 10_000])
def test_chunk_size_does_not_matter(chunk_size: int) -> None:
    case = make_case(PACKS[2])
    call = Call(case.q, case.k, case.v, case.slopes, tuple(case.cu_seqlens), case.initial_state, True)
    o, final_state = chunk_lightning_attention(call, chunk_size)
    expected = run(case, "naive")
    assert final_state is not None
    assert_close("o", o, expected["o"], rounded(torch.float64, 500))
    assert_close("final_state", final_state, expected["final_state"], rounded(torch.float64, 500))


@pytest.mark.parametrize("lengths", [[1], [65], [3, 1, 40, 21]], ids=name_of)
@pytest.mark.parametrize("initial", [False, True], ids=["zero", "initial"])
def test_recurrence_equals_dense(lengths: list[int], initial: bool) -> None:
    case = make_case(lengths, initial=initial)
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    leaves += [] if case.initial_state is None else [case.initial_state.clone().requires_grad_()]
    state = leaves[3] if initial else None
    results = dense_lightning_attention(leaves[0], leaves[1], leaves[2], case.slopes, lengths, state)
    gradients = torch.autograd.grad(results, leaves, [case.grad_o, case.grad_final_state])
    actual = run(case, "naive")
    for (name, value), expected in zip(actual.items(), (*results, *gradients), strict=True):
        assert_close(name, value, expected, rounded(torch.float64, sum(lengths)))


@pytest.mark.parametrize("backend", ["naive", "chunk"])
def test_gradcheck(backend: str) -> None:
    case = make_case([2, 63, 3], slopes=torch.tensor([0.3]))
    assert case.initial_state is not None
    inputs = [x[..., :2].clone() for x in (case.q, case.k, case.v, case.initial_state[:, :, :2])]

    def op(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Any:
        options: dict[str, Any] = dict(
            cu_seqlens=case.cu_seqlens, initial_state=state, output_final_state=True, backend=backend
        )
        return lightning_attention(q, k, v, case.slopes, **options)

    assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in inputs], fast_mode=True)


def test_gradient_through_final_state_alone() -> None:
    case = make_case(PACKS[1])
    gradients = []
    for backend in ("naive", "chunk"):
        q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
        options: dict[str, Any] = dict(cu_seqlens=case.cu_seqlens, output_final_state=True, backend=backend)
        _, final_state = lightning_attention(q, k, v, case.slopes, **options)
        gradients.append(torch.autograd.grad(final_state, (k, v), case.grad_final_state))
    for name, actual, expected in zip(("dk", "dv"), gradients[1], gradients[0], strict=True):
        assert_close(name, actual, expected, rounded(torch.float64, 260))


def test_strided_inputs_and_gradients() -> None:
    """q, k, v as slices of one fused tensor, and an output gradient that is an expanded scalar."""
    fused = torch.randn(130, 2, 24, dtype=torch.float64, requires_grad=True)
    slopes = layer_slopes(2, 0, 8)
    results = {}
    for backend in ("naive", "chunk"):
        q, k, v = fused.split(8, dim=-1)
        o = lightning_attention(q, k, v, slopes, cu_seqlens=[0, 70, 130], backend=backend)
        results[backend] = (o, *torch.autograd.grad(o.sum(), fused))
    for name, actual, expected in zip(("o", "d_fused"), results["chunk"], results["naive"], strict=True):
        assert_close(name, actual, expected, rounded(torch.float64, 130))


@pytest.mark.parametrize("backend", ["naive", "chunk"])
def test_documents_do_not_see_each_other(backend: str) -> None:
    """A document's results in a pack are those of the document alone, and do not move when its neighbours do."""
    case = make_case([30, 101, 50], initial=False, final=False)
    packed = run(case, backend)
    middle = slice(30, 131)
    alone = Case(case.q[middle], case.k[middle], case.v[middle], case.slopes, [101], None, case.grad_o[middle], None)
    for name, value in run(alone, backend).items():
        assert_close(name, packed[name][middle], value, rounded(torch.float64, 101))
    for x in (case.q, case.k, case.v, case.grad_o):
        x[:30] += 1e6
        x[131:] += 1e6
    for name, value in run(case, backend).items():
        assert torch.equal(value[middle], packed[name][middle]), name


def test_state_carries_a_document_on() -> None:
    """Cut anywhere, the second part continues from the first part's state; then token by token."""
    case = make_case([90], initial=False)
    whole = run(case, "naive")
    q, k, v = case.q, case.k, case.v
    head, state = lightning_attention(q[:37], k[:37], v[:37], case.slopes, output_final_state=True)
    rest = lightning_attention(q[37:80], k[37:80], v[37:80], case.slopes, initial_state=state, output_final_state=True)
    outputs, state = [head, rest[0]], rest[1]
    for token in range(80, 90):
        now = slice(token, token + 1)
        o, state = lightning_attention_step(q[now], k[now], v[now], case.slopes, state)
        outputs.append(o)
    assert_close("o", torch.cat(outputs), whole["o"], rounded(torch.float64, 90))
    assert_close("final_state", state, whole["final_state"], rounded(torch.float64, 90))


def test_step_is_differentiable_and_keeps_its_state() -> None:
    case = make_case([1, 1])
    assert case.initial_state is not None
    q, k, v, state = (x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.initial_state))
    before = state.detach().clone()
    o, new_state = lightning_attention_step(q, k, v, case.slopes, state)
    gradients = torch.autograd.grad([o, new_state], [q, k, v, state], [case.grad_o, case.grad_final_state])
    expected = run(case, "naive")
    for (name, value), actual in zip(expected.items(), (o, new_state, *gradients), strict=True):
        assert_close(name, actual, value, rounded(torch.float64, 1))
    assert torch.equal(state.detach(), before)


@pytest.mark.parametrize("backend", ["naive", "chunk"])
def test_dtypes(backend: str) -> None:
    results = run(make_case([20, 50], dtype=torch.bfloat16), backend)
    dtypes = {name: value.dtype for name, value in results.items()}
    states = dict.fromkeys(("final_state", "d_initial_state"), torch.float32)
    assert dtypes == dict.fromkeys(("o", "dq", "dk", "dv"), torch.bfloat16) | states
    assert results["o"].is_contiguous()


@pytest.mark.parametrize("length", [30, 170])
def test_autocast_does_not_reach_the_states(length: int) -> None:
    """Of one chunk and of several; backward too, for what we differentiate ourselves."""
    case = make_case([length], dtype=torch.float32)
    with torch.autocast("cpu", enabled=False):
        expected = run(case, "chunk")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(case, "chunk")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    x, gate, weight = torch.randn(9, 2, 8), torch.randn(9, 2, 8), torch.ones(16, requires_grad=True)
    y = gated_rms_norm(x, weight, gate, 1e-6)
    (expected_grad,) = torch.autograd.grad(y.sum(), weight, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (actual_grad,) = torch.autograd.grad(y.sum(), weight)
    assert torch.equal(actual_grad, expected_grad)


def test_backward_keeps_only_the_inputs() -> None:
    case = make_case([1000], initial=False, final=False)
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        lightning_attention(case.q.requires_grad_(), case.k, case.v, case.slopes)
    assert sum(kept) == sum(x.numel() for x in (case.q, case.k, case.v, case.slopes))


def test_backend_choice() -> None:
    """One function: Triton on GPUs, torch's operations elsewhere, unless a name is given."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [choose_backend(device) for device in (cpu, gpu)] == ["chunk", "triton"]
    assert [choose_backend(gpu, name) for name in ("naive", "chunk", "triton")] == ["naive", "chunk", "triton"]
    with pytest.raises(ValueError, match=r"'tritn'.*chunk.*naive.*triton"):
        choose_backend(cpu, "tritn")


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": (dict(q=torch.zeros(7, 3)), r"q \(7, 3\)"),
    "key shape": (dict(k=torch.zeros(7, 3, 9)), r"k \(7, 3, 9\)"),
    "value heads": (dict(v=torch.zeros(7, 2, 5)), r"v \(7, 2, 5\)"),
    "no tokens": (dict.fromkeys("qkv", torch.zeros(0, 3, 5)), "at least 1"),
    "mixed dtypes": (dict(k=torch.zeros(7, 3, 6, dtype=torch.bfloat16)), "k torch.bfloat16"),
    "integers": (dict.fromkeys("qkv", torch.zeros(7, 3, 5, dtype=torch.int64)), "torch.int64"),
    "slope list": (dict(slopes=[1.0, 1.0, 1.0]), "slopes are a list: give a float32 tensor"),
    "slope count": (dict(slopes=torch.ones(4)), r"\(4,\).*\[3\]"),
    "slope dtype": (dict(slopes=torch.ones(3, dtype=torch.bfloat16)), "torch.bfloat16"),
    "slope gradient": (dict(slopes=torch.ones(3, requires_grad=True)), "detach"),
    "slope sign": (dict(slopes=torch.tensor([0.1, -0.5, 0.2])), "-0.5"),
    "slope infinite": (dict(slopes=torch.tensor([0.1, float("inf"), 0.2])), "inf"),
    "devices": (dict(slopes=torch.ones(3, device="meta")), "'cpu', 'meta'"),
    "bounds dtype": (dict(cu_seqlens=torch.tensor([0.0, 7.0])), "torch.float32"),
    "bounds rank": (dict(cu_seqlens=torch.tensor([[0, 7]])), r"\(1, 2\)"),
    "bounds an int": (dict(cu_seqlens=7), r"cu_seqlens is 7: give N \+ 1 ints, the last of them 7"),
    "bounds text": (dict(cu_seqlens=["0", "7"]), "cu_seqlens holds '0', a str: give ints"),
    "bounds fractions": (dict(cu_seqlens=[0, 4.5, 7]), "cu_seqlens holds 4.5, a float"),
    "bounds start": (dict(cu_seqlens=[1, 7]), r"begins \[1, 7\]"),
    "no document": (dict(cu_seqlens=[0]), r"begins \[0\]"),
    "empty document": (dict(cu_seqlens=[0, 4, 4, 7]), r"document 1 at \[4, 4\)"),
    "bounds end": (dict(cu_seqlens=[0, 4, 8]), "ends at 8, but the pack has 7 tokens: let it end there"),
    "state count": (dict(initial_state=torch.zeros(2, 3, 6, 5)), r"\[1, 3, 6, 5\]"),
    "state dtype": (dict(initial_state=torch.zeros(1, 3, 6, 5).bfloat16()), "initial_state is torch.bfloat16"),
    "state device": (dict(initial_state=torch.zeros(1, 3, 6, 5, device="meta")), "on meta"),
    "backend": (dict(backend="tritn"), "'tritn'.*chunk.*naive"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_wrong_arguments_are_named(name: str) -> None:
    changes, message = BAD_CALLS[name]
    case = make_case([7], dtype=torch.float32)
    call = dict(q=case.q, k=case.k, v=case.v, slopes=case.slopes) | changes
    with pytest.raises(ValueError, match=message):
        lightning_attention(**call)


def test_step_checks_its_state() -> None:
    case = make_case([2], dtype=torch.float32)
    assert case.initial_state is not None
    with pytest.raises(ValueError, match=r"state has shape \(1, 3, 6, 5\): give \[B, H, Dk, Dv\] = \[2, 3, 6, 5\]"):
        lightning_attention_step(case.q, case.k, case.v, case.slopes, case.initial_state)


def test_decoding_takes_the_model_s_backend() -> None:
    """One new token a sequence, and several: both ask for the backend that is named."""
    for tokens in (2, 4):
        cache, x = LightningCache(2), torch.ones(tokens, 1, 16)
        with pytest.raises(ValueError, match="'tritn'"):
            cache.attend([0, 1], x, x, x, torch.ones(1), [0, tokens // 2, tokens], "tritn")
