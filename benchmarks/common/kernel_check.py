"""Whether the Triton kernels are right, compiled on a GPU or interpreted: errors as shares of what is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.lightning_cases import Case, error_by_head, make_case, run
from benchmarks.common.rounded_lightning import rounded_lightning_attention
from benchmarks.common.tolerances import KERNEL_DTYPES, floor, rounded
from megatron_m1.kernels.lightning import (
    layer_slopes,
    lightning_attention_step,
    lightning_state,
    silu_lightning_attention,
)
from megatron_m1.kernels.rmsnorm import gated_rms_norm


def shares(case: Case, truth: str) -> dict[str, float]:
    """Largest error of each result over heads, as a share of what is allowed, against backend ``truth`` in float64.

    Allowed is twice the error of the naive form whose operands are rounded to the inputs' dtype and added up in
    float32, plus ``tolerances.floor``, a share of the result's norm.
    """
    expected, actual = run(case.upcast(), truth), run(case, "triton")
    assert actual.keys() == expected.keys()
    naive = rounded_lightning_attention(
        case.q, case.k, case.v, case.slopes, case.lengths, case.initial_state, case.grad_o, case.grad_final_state
    )
    tokens, width = sum(case.lengths), max(case.q.shape[2], case.v.shape[2])
    found = {}
    for name, value in expected.items():
        states = name in ("final_state", "d_initial_state")
        assert actual[name].dtype == (torch.float32 if states else case.q.dtype)
        found[name] = _share(actual[name], value, floor(case.q.dtype, tokens, width, state=states), naive[name])
    return found


def _share(actual: Tensor, expected: Tensor, relative: float, naive: Tensor | None = None) -> float:
    """Error over what is allowed, of the worst head (dim 1); infinite where there is a NaN."""
    underflow = torch.finfo(torch.float32).tiny * actual.numel()
    allowed = relative * error_by_head(expected, torch.zeros_like(expected)) + underflow
    if naive is not None:
        allowed += 2 * error_by_head(naive, expected)
    return float((error_by_head(actual, expected) / allowed).nan_to_num(nan=float("inf")).max())


def silu_shares(parts: Tensor, grad: Tensor, slopes: Tensor, lengths: list[int]) -> dict[str, float]:
    """The same of SiLU on load: allowed is twice the error of SiLU, rounded, before the rounded naive form."""
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    wide = parts.double().requires_grad_()
    true, _ = silu_lightning_attention(wide, slopes, cu_seqlens=bounds, backend="chunk")
    (true_grad,) = torch.autograd.grad(true, wide, grad.double())
    raw = parts.float().requires_grad_()
    through = torch.nn.functional.silu(raw)
    q, k, v = through.detach().to(parts.dtype).unbind(2)
    naive = rounded_lightning_attention(q, k, v, slopes, lengths, None, grad, None)
    flow = torch.stack([naive[name] for name in ("dq", "dk", "dv")], dim=2)  # [T, H, 3, D]
    (naive_grad,) = torch.autograd.grad(through, raw, flow.float())
    leaf = parts.detach().requires_grad_()
    o, _ = silu_lightning_attention(leaf, slopes, cu_seqlens=bounds, backend="triton")
    (leaf_grad,) = torch.autograd.grad(o, leaf, grad)
    relative = floor(parts.dtype, sum(lengths), parts.shape[3], state=False)
    return {
        "o": _share(o.detach(), true.detach(), relative, naive["o"]),
        "d_parts": _share(leaf_grad, true_grad, relative, naive_grad.to(parts.dtype)),
    }


def _norm_shares(x: Tensor, gate: Tensor, grad: Tensor) -> dict[str, float]:
    """Of the gated norm, which rounds results alone; its sums are over a row or a column."""
    weight = torch.linspace(0.5, 1.5, x.shape[1] * x.shape[2], device=x.device).to(x.dtype)
    outcomes = []
    for backend, dtype in (("triton", x.dtype), ("naive", torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, gate)]
        y = gated_rms_norm(leaves[0], leaves[1], leaves[2], 1e-6, backend=backend)
        outcomes.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))])
    relative = rounded(x.dtype, x.shape[0], weight.numel())
    pairs = zip(("y", "dx", "dweight", "dgate"), *outcomes, strict=True)
    # Without a dimension of heads, all of a tensor is one.
    return {name: _share(a.reshape(-1, 1), e.reshape(-1, 1), relative) for name, a, e in pairs}


def _state_shares(case: Case) -> dict[str, float]:
    """Of the state of tokens alone, and of one more token for each of its documents."""
    count = len(case.lengths)
    found = []
    for backend, of in (("triton", case), ("naive", case.upcast())):
        k, v = (x.detach().requires_grad_() for x in (of.k, of.v))
        state = lightning_state(k, v, of.slopes, cu_seqlens=of.cu_seqlens, backend=backend)
        gradients = torch.autograd.grad(state, (k, v), torch.ones_like(state))
        rows = [x[:count].detach() for x in (of.q, of.k, of.v)]
        step = lightning_attention_step(rows[0], rows[1], rows[2], of.slopes, state.detach(), backend=backend)
        found.append([state.detach(), *gradients, *step])
    # Gradients of states read them rounded.
    relative = rounded(case.q.dtype, sum(case.lengths), case.q.shape[2], roundings=2)
    pairs = zip(("state", "dk", "dv", "step o", "step state"), *found, strict=True)
    return {name: _share(a, e, relative) for name, a, e in pairs}


def check_kernels(device: torch.device, lengths: list[int], heads: int, width: int) -> dict[str, float]:
    """Every op that has a Triton form, in every dtype, on a pack and on its tokens as one document.

    Args:
        device: a GPU, or the CPU under the interpreter.
        lengths: tokens of each document.
        heads: half of them M1's strongest decays (layer 0), half its weakest (layer 78); even, at most 64.
        width: of keys and values.

    Returns:
        By what it is the error of: its largest share of what is allowed. Above 1 the kernels are wrong.
    """
    slopes = torch.cat([layer_slopes(64, 0, 80)[: heads // 2], layer_slopes(64, 78, 80)[64 - heads // 2 :]])
    found: dict[str, float] = {}

    def add(what: str, values: dict[str, float]) -> None:
        found.update({f"{what} {name}": value for name, value in values.items()})

    for dtype in KERNEL_DTYPES:
        short = str(dtype).removeprefix("torch.")
        for case in _cases(dtype, slopes, lengths, width):
            case = case.to(device)
            kind = "document" if len(case.lengths) == 1 else "pack"
            add(f"{short} {kind}", shares(case, truth="chunk"))
            parts = torch.stack([case.q, case.k, case.v], dim=2)  # [T, H, 3, D]
            add(f"{short} {kind} silu", silu_shares(parts, case.grad_o, case.slopes, case.lengths))
        add(f"{short} pieces", _state_shares(case))
        add(f"{short} norm", _norm_shares(case.q, case.k, case.grad_o))
    return found


def check_timed(slopes: Tensor, lengths: list[int], width: int) -> dict[str, float]:
    """Attention in bfloat16 as a benchmark times it: without states, with all its heads, so in the same configurations
    and, where these heads fill the GPU, without segments.

    Args:
        slopes: [H] float32 of the heads that are timed, on the device.
        lengths: tokens of each document of the pack; one document of all tokens is checked as well.
        width: of keys and values.

    Returns:
        As ``check_kernels``.
    """
    found: dict[str, float] = {}
    for kind, documents in (("document", [sum(lengths)]), ("pack", lengths)):
        options: dict[str, Any] = dict(dtype=torch.bfloat16, slopes=slopes.cpu(), dims=(width, width))
        case = make_case(documents, **options, initial=False, final=False).to(slopes.device)
        parts = torch.stack([case.q, case.k, case.v], dim=2)  # [T, H, 3, D]
        plain, through = shares(case, truth="chunk"), silu_shares(parts, case.grad_o, case.slopes, documents)
        for what, values in (("timed", plain), ("timed silu", through)):
            found.update({f"{what} {kind} {name}": value for name, value in values.items()})
    return found


def _cases(dtype: torch.dtype, slopes: Tensor, lengths: list[int], width: int) -> Iterator[Case]:
    yield make_case([sum(lengths)], dtype=dtype, slopes=slopes, dims=(width, width), initial=False, final=False)
    yield make_case(lengths, dtype=dtype, slopes=slopes, dims=(width, width))
