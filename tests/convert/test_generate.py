"""The sampler against the forward pass of training, token by token."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_m1.cli import run
from megatron_m1.generate.sampler import choose
from megatron_m1.generate.sampling import Sampling
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.shapes.registry import MIXERS
from tests.convert import runs
from tests.convert.conftest import Run
from tests.model.meshes import run_config

TOLERANCE = 2e-5
"""Of fp32 logits, relative to the largest: eight layers' sums in another order; 1e-6 is usual."""


def prompts_of(lengths: list[int], vocabulary: int = 104) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def test_every_logit_is_that_of_training(workers: WorkerPool, fp32_run: Run) -> None:
    """Prompts of very different lengths, chunks that cut them anywhere and hold several of them, one-token prompts."""
    prompts = prompts_of([1, 130, 7, 65])
    (result,) = workers.run(runs.generate_and_compare, fp32_run.folder, prompts, 9, [4096, 1, 13, 64, 66], world_size=1)
    assert len(result.errors) == 5
    for name, error in result.errors.items():
        assert error < TOLERANCE, name
    assert result.tokens == result.greedy
    assert len({tuple(new) for new in result.tokens}) > 1, "the prompts matter"


def test_a_decode_step_keeps_the_size_of_the_lightning_states(workers: WorkerPool, fp32_run: Run) -> None:
    (result,) = workers.run(runs.generate_and_compare, fp32_run.folder, prompts_of([3, 60]), 80, [16], world_size=1)
    model, states = run_config({}).model, 2 * 4 * 16 * 16 * 4
    assert states == 2 * MIXERS["lightning"].state_bytes(model), "sequences x heads x dim x dim, fp32"
    assert all(sizes[layer] == states for sizes in result.bytes_by_step for layer in range(1, 8))
    rows = [sizes[8] for sizes in result.bytes_by_step]
    assert rows[-1] > rows[0]
    # Keys and values of one layer; memory doubles, so at most half of it is empty.
    tokens = MIXERS["softmax"].cache_bytes_per_token(model, 4)
    assert tokens == 2 * 2 * 16 * 4, "keys and values x groups x dim, fp32"
    assert tokens * (82 + 139) <= rows[-1] <= 2 * tokens * (83 + 140)


def draws(logits: torch.Tensor, sampling: Sampling, count: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = [choose(logits, sampling, generator) for _ in range(count)]
    return torch.bincount(torch.tensor(ids), minlength=logits.numel()) / count


def test_temperature_and_top_p() -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])
    logits = probabilities.log()
    noise = 4 * (0.25 / 4000) ** 0.5
    torch.testing.assert_close(draws(logits, Sampling(temperature=1.0)), probabilities, atol=noise, rtol=0)
    sharp = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(draws(logits, Sampling(temperature=0.5)), sharp, atol=noise, rtol=0)
    # 0.4 and 0.25 are less than 0.7 together: the next one belongs to them, and no further one.
    kept = torch.tensor([0.0, 0.4, 0.25, 0.2, 0.0]) / 0.85
    torch.testing.assert_close(draws(logits, Sampling(temperature=1.0, top_p=0.7)), kept, atol=noise, rtol=0)
    assert draws(logits, Sampling(temperature=1.0, top_p=1e-9), 50)[1] == 1.0
    assert draws(logits, Sampling(), 1)[1] == 1.0
    assert draws(1e4 * logits, Sampling(temperature=1e-308), 50)[1] == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(value: float, temperature: float) -> None:
    with pytest.raises(ValueError, match=r"^logits are not finite: the model has diverged"):
        draws(torch.tensor([0.0, value, 1.0]), Sampling(temperature=temperature), 1)


def test_draws_are_reproducible_and_do_not_depend_on_other_prompts(workers: WorkerPool, fp32_run: Run) -> None:
    several = prompts_of([4, 30, 9])
    sampling = Sampling(max_tokens=12, temperature=1.0, top_p=0.9, seed=8)
    (together,) = workers.run(runs.sample, fp32_run.folder, several, sampling, world_size=1)
    (again,) = workers.run(runs.sample, fp32_run.folder, several, sampling, world_size=1)
    (alone,) = workers.run(runs.sample, fp32_run.folder, several[:1], sampling, world_size=1)
    assert together == again
    assert together[0] == alone[0]
    stop = together[1][5]
    first = together[1].index(stop)
    stopping = Sampling(max_tokens=12, temperature=1.0, top_p=0.9, seed=8, stop=stop)
    (stopped,) = workers.run(runs.sample, fp32_run.folder, several, stopping, world_size=1)
    assert stopped[1] == together[1][:first]
    for ids, whole in zip(stopped, together, strict=True):
        assert ids == list(itertools.takewhile(lambda token: token != stop, whole))


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(max_tokens=0), r"^max_tokens = 0: give 1 or more"),
        (Sampling(temperature=-1.0), r"^temperature = -1\.0: give 0"),
        (Sampling(temperature=float("nan")), r"^temperature = nan: give 0"),
        (Sampling(top_p=0.0), r"^top_p = 0\.0: give a share"),
        (Sampling(chunk_tokens=0), r"^chunk_tokens = 0: give 1 or more"),
        (Sampling(seed=2**63), r"^seed = 9223372036854775808: give 0 to 2\^63 - 1"),
        (Sampling(seed=-1), r"^seed = -1: give 0 to"),
    ],
)
def test_numbers_out_of_range(sampling: Sampling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling.check()


def test_a_prompt_in_another_encoding() -> None:
    with pytest.raises(ValueError, match=r"^prompt 'caf\\udce9' is not UTF-8"):
        run(["generate", "nowhere", "--prompt", b"caf\xe9".decode("utf-8", "surrogateescape")])


@pytest.mark.parametrize(("prompt", "message"), [([], "a prompt is empty"), ([104], "beyond the model's 104 ids")])
def test_wrong_prompts(workers: WorkerPool, fp32_run: Run, prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workers.run(runs.sample, fp32_run.folder, [[1], prompt], Sampling(), world_size=1)
