"""When communication starts and when it is waited for, on the recorded time line of a training step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

from megatron_m1.config import Config
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.step import train_step
from tests.model.meshes import my_share, packs, run_config, start

CP = "context_parallel_size"
BOUNDS = [[0, 60]]
LIGHTNING_LAYERS = 7
RANKS = 4

Span = tuple[str, float, float]


def time_line(rank: int, world_size: int, config: Config) -> list[Span]:
    """The marked spans (name, start, end) of one step on one pack, in the order of their starts."""
    trained = start(config, world_size)
    batch = my_share(trained, packs(documents=BOUNDS))
    train_step(trained, batch, lr=0.0)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        train_step(trained, batch, lr=0.0)
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events()
        if event.name.startswith(("lasp: ", "ring: "))
    ]
    return sorted(spans, key=lambda span: span[1])


@pytest.fixture(scope="module")
def time_lines(workers: WorkerPool) -> dict[str, list[list[Span]]]:
    """Every rank's spans, without recomputation and with both kinds."""
    kinds: dict[str, dict[str, Any]] = {
        "none": {},
        "full": {"recompute_granularity": "full"},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    }
    return {
        kind: workers.run(time_line, run_config({CP: RANKS}, train, documents=BOUNDS), world_size=RANKS)
        for kind, train in kinds.items()
    }


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_two_gathers_a_layer_and_step(recompute: str, time_lines: dict[str, list[list[Span]]]) -> None:
    for spans in time_lines[recompute]:
        names = [name for name, _, _ in spans]
        assert names.count("lasp: start gather") == 2 * LIGHTNING_LAYERS
        assert names.count("lasp: wait for gather") == 2 * LIGHTNING_LAYERS
        repeated = 1 if recompute == "none" else 2
        assert names.count("lasp: local attention") == repeated * LIGHTNING_LAYERS
        assert names.count("lasp: local attention backward") == LIGHTNING_LAYERS


@pytest.mark.parametrize("compute", ["lasp: local attention", "lasp: local attention backward"])
def test_the_gather_travels_while_the_own_tokens_are_computed(
    compute: str, time_lines: dict[str, list[list[Span]]]
) -> None:
    for spans in time_lines["none"]:
        lasp = [span for span in spans if span[0].startswith("lasp: ")]
        assert len(lasp) % 3 == 0
        found = [group for group in itertools.batched(lasp, 3) if group[1][0] == compute]
        assert len(found) == LIGHTNING_LAYERS
        for started, computed, waited in found:
            assert (started[0], waited[0]) == ("lasp: start gather", "lasp: wait for gather")
            assert started[2] <= computed[1] and computed[2] <= waited[1]


@pytest.mark.parametrize("suffix", ["", " backward"])
def test_the_next_block_travels_while_one_is_computed(suffix: str, time_lines: dict[str, list[list[Span]]]) -> None:
    for spans in time_lines["none"]:
        ring = [span for span in spans if span[0].startswith("ring: ")]
        first_backward = next(i for i, span in enumerate(ring) if span[0].endswith("backward"))
        # The backward pass begins with an exchange too.
        part = ring[first_backward - 1 :] if suffix else ring[: first_backward - 1]
        names = [name for name, _, _ in part if not name.endswith("return")]
        expected = ["ring: start exchange", f"ring: local attention{suffix}"]
        for distance in range(1, RANKS):
            expected.append("ring: wait for exchange")
            if distance < RANKS - 1:
                expected.append("ring: start exchange")
            expected.append(f"ring: block attention{suffix}")
        assert names == expected
        assert all(before[2] <= after[1] for before, after in itertools.pairwise(part)), "no span lies within another"
        returns = [name for name, _, _ in part if name.endswith("return")]
        assert returns == (["ring: start return", "ring: wait for return"] * (RANKS - 1) if suffix else [])
        if suffix:
            # What a block gives back is waited for after the next block is computed.
            order = [name for name, _, _ in part]
            first_return = order.index("ring: start return")
            assert f"ring: block attention{suffix}" in order[first_return : order.index("ring: wait for return")]
