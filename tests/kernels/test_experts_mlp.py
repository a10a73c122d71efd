"""Several experts at once, by every way to compute them, against one after the other by the formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.common.poison import nan_filled_empty
from megatron_m1.kernels.expert_mlp.grouped import ALIGNMENT, Grouped, grouped
from megatron_m1.kernels.expert_mlp.naive import naive_expert_mlp
from megatron_m1.kernels.expert_mlp.one_by_one import one_by_one
from tests.kernels.test_expert_mlp import make, tolerance

COUNTS = {
    "some": [5, 17, 1, 9],
    "an expert without rows": [0, 12, 0, 3],
    "multiples": [ALIGNMENT, 2 * ALIGNMENT],
    "one expert": [13],
    "no rows": [0, 0, 0],
}


def arguments(counts: list[int], hidden: int, ffn: int) -> tuple[list[Tensor], Tensor]:
    """x, scale, fc1, fc2, fc1, ... and the output's gradient."""
    made = [make(count, hidden, ffn) for count in counts]
    x, scale, grad = (
        torch.cat(parts) for parts in ([m[0][0] for m in made], [m[0][1] for m in made], [m[1] for m in made])
    )
    weights = [weight * (1 + 0.1 * index) for index, m in enumerate(made) for weight in m[0][2:]]
    return [x, scale, *weights], grad


def truth(counts: list[int], leaves: list[Tensor]) -> Tensor:
    parts = zip(leaves[0].split(counts), leaves[1].split(counts), leaves[2::2], leaves[3::2], strict=True)
    return torch.cat([naive_expert_mlp(*part) for part in parts])


@pytest.mark.parametrize(
    ("shape", "dtype", "taken"),
    [
        ((16, 24), torch.bfloat16, True),
        ((16, 20), torch.bfloat16, False),
        ((12, 24), torch.bfloat16, False),
        ((16, 24), torch.float32, False),
    ],
)
def test_what_grouped_products_take(shape: tuple[int, int], dtype: torch.dtype, taken: bool) -> None:
    """Torch refuses rows that are not multiples of 16 bytes."""
    assert Grouped.takes(torch.empty(shape, dtype=dtype)) is taken


def test_torch_refuses_rows_that_are_not_aligned() -> None:
    (x, scale, *weights), _ = arguments([8], 12, 24)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        Grouped().forward(x.bfloat16(), scale, [8], [w.bfloat16() for w in weights])


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("compute", [one_by_one, grouped])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_formula(compute: Callable[..., Tensor], name: str, dtype: torch.dtype) -> None:
    counts, hidden, ffn = COUNTS[name], 16, 24
    given, grad = arguments(counts, hidden, ffn)
    low = [given[1] if index == 1 else t.to(dtype) for index, t in enumerate(given)]
    leaves = [t.detach().requires_grad_() for t in low]
    with nan_filled_empty():
        output = compute(leaves[0], leaves[1], counts, leaves[2:])
        found = [output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))]
    wide = [t.detach().double().requires_grad_() for t in low]
    true = truth(counts, wide)
    wanted: list[Tensor | None] = [
        true.detach(),
        *torch.autograd.grad(true, wide, grad.to(dtype).double(), allow_unused=True),
    ]
    for ours, expected in zip(found, wanted, strict=True):
        if expected is None:
            assert not ours.any()
            continue
        assert ours.shape == expected.shape
        assert (ours.double() - expected).norm() <= tolerance(dtype, max(counts), hidden, ffn) * expected.norm()


@pytest.mark.parametrize("compute", [one_by_one, grouped])
def test_frozen_weights_get_nothing(compute: Callable[..., Tensor]) -> None:
    """And change nothing for the others."""
    counts = COUNTS["an expert without rows"]
    given, grad = arguments(counts, 16, 24)
    low = [given[1] if index == 1 else t.bfloat16() for index, t in enumerate(given)]

    def gradients(frozen: set[int]) -> list[Tensor | None]:
        leaves = [t.detach().requires_grad_(index not in frozen) for index, t in enumerate(low)]
        compute(leaves[0], leaves[1], counts, leaves[2:]).backward(grad.bfloat16())
        return [leaf.grad for leaf in leaves]

    everything = gradients(set())
    for frozen in ({3}, {2, 4, 6, 8}, set(range(2, len(low)))):
        for index, (found, wanted) in enumerate(zip(gradients(frozen), everything, strict=True)):
            if index in frozen:
                assert found is None
            else:
                assert found is not None and wanted is not None
                assert torch.equal(found, wanted)
