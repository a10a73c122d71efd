"""The choice between configurations: the least time wins, and results agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.common.lightning_cases import assert_close
from benchmarks.common.tolerances import rounded
from megatron_m1.kernels.lightning.triton_config import NO_SILU, Silu
from megatron_m1.kernels.lightning.triton_launch import Walk
from megatron_m1.kernels.lightning.triton_tune import Kind, fastest, tuned_walk
from megatron_m1.kernels.lightning.walk_plan import Segment

CPU = torch.device("cpu")
KINDS = {
    "output": Kind(2, 48, 40, torch.bfloat16, CPU, False, False, NO_SILU),
    "dk": Kind(2, 48, 40, torch.float16, CPU, True, True, NO_SILU),
    "dv": Kind(2, 48, 40, torch.bfloat16, CPU, True, False, NO_SILU),
}


@pytest.mark.parametrize("name", KINDS)
def test_configurations_agree(name: str) -> None:
    kind = KINDS[name]
    assert len(kind.candidates) == 2
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(70, 2, n, generator=generator).to(kind.dtype) for n in (48, 48, 40))
    state = torch.randn(1, 2, 48, 40, generator=generator)
    table = torch.tensor([Segment(0, 70, 0, -1, 0)], dtype=torch.int32)
    outcomes = []
    for config in kind.candidates:
        walk = Walk(config, a, b, c, torch.tensor([0.3, 0.01]), kind.reverse, kind.transposed, kind.silu)
        output, final = torch.full_like(c, float("nan")), torch.full_like(state, float("nan"))
        walk.launch(table, output, state, None, final)
        outcomes.append((output, final))
    assert outcomes[0][0].isfinite().all()
    # Sums of the same float32 numbers; in which order the interpreter adds them depends on a product's size.
    for one, other in zip(*outcomes, strict=True):
        assert_close("", one, other, rounded(one.dtype, 70, 48))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("best", [0, 1])
def test_the_least_time_wins(name: str, best: int) -> None:
    kind, ran = KINDS[name], []

    def time(run: Callable[[], None]) -> float:
        run()
        ran.append(run)
        return 1.0 if len(ran) - 1 == best else 2.0

    assert fastest(kind, time, tokens=70) == kind.candidates[best]
    assert len(ran) == 2


@pytest.mark.parametrize("silu", [NO_SILU, (False, True, True)])
def test_the_interpreter_takes_the_default(silu: Silu) -> None:
    x = torch.zeros(3, 2, 16)
    walk = tuned_walk(x, x, x, torch.ones(2), silu=silu)
    assert walk.config == Kind(2, 16, 16, x.dtype, CPU, False, False, silu).candidates[0]
