"""The command on one process against the library's own model, and on every mesh against one process."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_m1
from megatron_m1 import cli
from megatron_m1.commands.evaluate import command_parser
from megatron_m1.config.fields import field_types
from megatron_m1.config.io import parse_config
from megatron_m1.config.resolve import resolve
from megatron_m1.data.tokenizers import load_tokenizer
from megatron_m1.evaluation.needle import Haystack, NeedlePacks
from megatron_m1.evaluation.plan import NeedlePlan, check_lengths, padded_tokens
from megatron_m1.evaluation.scores import CELLS, NOWHERE
from megatron_m1.evaluation.sequences import Scored
from megatron_m1.runtime.pool import WorkerPool
from tests.evaluation import evaluation_runs as runs
from tests.evaluation.conftest import PACKS, TrainedRun

NEEDLE = NeedlePlan(lengths=(80, 101), depths=(0.0, 0.4, 1.0), samples=2, seed=5)
WORDS = ["--perplexity", "--needle", "80,101", "--depths", "0,0.4,1", "--samples", "2", "--seed", "5"]
TOLERANCE = 1e-5
"""Relative, for losses of a model that has hardly been trained: fp32 sums in another order."""
MESHES = {
    "tensor": ["--parallel.tensor_model_parallel_size", "2"],
    "context": ["--parallel.context_parallel_size", "2"],
    "pipeline": ["--parallel.pipeline_model_parallel_size", "2"],
    "interleaved": [
        "--parallel.pipeline_model_parallel_size=2",
        "--parallel.virtual_pipeline_model_parallel_size=2",
    ],
    "expert": ["--parallel.expert_model_parallel_size", "2"],
}
Files = dict[str, dict[str, Any]]


def evaluated(workers: WorkerPool, run: TrainedRun, output: Path, *words: str, world_size: int = 1) -> Files:
    (status, printed), *others = workers.run(
        runs.evaluate,
        [str(run.folder), *WORDS, "--output", str(output), *words],
        world_size=world_size,
        process_group=False,
    )
    assert status == 0 and all(other == (0, "") for other in others)
    assert str(output / "perplexity.png") in printed and "position in the document" in printed
    for kind in ("perplexity", "needle"):
        assert (output / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    return {kind: runs.record(output, kind) for kind in ("perplexity", "needle")}


@pytest.fixture(scope="module")
def alone(workers: WorkerPool, run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """What one process finds."""
    return evaluated(workers, run, tmp_path_factory.mktemp("alone") / "results")


def test_all_packs_have_the_loss_of_the_runs_validation(alone: Files, run: TrainedRun) -> None:
    found = alone["perplexity"]
    assert found["loss"] == pytest.approx(run.validation_loss, rel=1e-6)
    assert (found["packs"], found["seq_length"], found["step"]) == (PACKS, 64, 2)
    assert [found[name] for name in ("processes", "tensor", "context", "pipeline", "expert")] == [1] * 5


def test_positions_and_sources_are_those_of_the_librarys_losses(alone: Files, run: TrainedRun) -> None:
    model = megatron_m1.load(run.folder)
    losses: dict[tuple[str, int], list[float]] = defaultdict(list)
    for pack in megatron_m1.packed_data(run.folder, split="validation"):
        per_token = model.loss(pack, per_token=True).tolist()
        for document in pack.documents:
            for at in range(document.start, document.end):
                if pack.loss_mask[at]:
                    context = at - document.start + 1
                    losses["document", context.bit_length() - 1].append(per_token[at])
                    losses["pack", (at + 1).bit_length() - 1].append(per_token[at])
                    losses[document.corpus, context.bit_length() - 1].append(per_token[at])
    found = alone["perplexity"]
    assert list(found["by_source"]) == run.corpora
    curves = {"document": found["by_document_position"], "pack": found["by_pack_position"]}
    curves |= {name: row["by_document_position"] for name, row in found["by_source"].items()}
    for name, rows in curves.items():
        assert rows
        for row in rows:
            expected = losses.pop((name, row["from"].bit_length() - 1))
            assert row["tokens"] == len(expected), name
            assert row["loss"] == pytest.approx(sum(expected) / len(expected), rel=TOLERANCE)
            assert row["to"] == min(2 * row["from"] - 1, 64)
    assert not losses
    by_source = [row["tokens"] for row in found["by_source"].values()]
    assert sum(by_source) == found["tokens"] and min(by_source) > 0


@pytest.fixture(scope="module")
def needles(run: TrainedRun) -> dict[int, NeedlePacks]:
    """The packs of every length."""
    tokenizer = load_tokenizer(run.tokenizer)
    haystack = Haystack(run.corpora, tokenizer.eod)
    return {length: NeedlePacks(NEEDLE, length, haystack, tokenizer) for length in NEEDLE.lengths}


def test_needles_lie_where_they_should(needles: dict[int, NeedlePacks], run: TrainedRun) -> None:
    tokenizer = load_tokenizer(run.tokenizer)
    for length, packs in needles.items():
        assert len(packs) == len(NEEDLE.depths) * NEEDLE.samples
        for index, (depth, sample) in enumerate(packs.cases):
            pack, hidden = packs[index], packs.hidden[sample]
            ids = [*pack.tokens.tolist(), int(pack.labels[-1])]
            assert len(pack.tokens) == length and ids[1:] == pack.labels.tolist()
            hay = length + 1 - len(hidden.sentence) - len(hidden.question) - len(hidden.answer)
            at = round(depth * hay)
            assert ids[at : at + len(hidden.sentence)] == hidden.sentence
            text = tokenizer.decode(hidden.sentence)
            assert text.startswith("\nThe secret number of the ") and text.endswith(".\n")
            assert tokenizer.decode(hidden.answer).strip().isdigit()
            assert ids[-len(hidden.answer) - len(hidden.question) :] == [*hidden.question, *hidden.answer]
            labels = [label for label, cell in zip(pack.labels, pack.extra[CELLS][:, 0], strict=True) if cell == index]
            assert labels == hidden.answer and int((pack.extra[CELLS] != NOWHERE).sum()) == len(hidden.answer)
            assert tokenizer.eod not in ids
    first = needles[80]
    assert first.hidden[0] != first.hidden[1], "samples differ"


def test_needles_are_scored_as_the_librarys_model_does(
    alone: Files, needles: dict[int, NeedlePacks], run: TrainedRun
) -> None:
    model = megatron_m1.load(run.folder)
    cells = iter(alone["needle"]["cells"])
    for length, packs in needles.items():
        for depth in NEEDLE.depths:
            cell = next(cells)
            assert (cell["length"], cell["depth"], cell["samples"]) == (length, depth, NEEDLE.samples)
            losses, right, found = [], [], []
            for index, case in enumerate(packs.cases):
                if case[0] == depth:
                    pack = packs[index]
                    asked = pack.extra[CELLS][:, 0] != NOWHERE
                    losses += model.loss(pack, per_token=True)[asked].tolist()
                    hits = (model.logits(pack).argmax(dim=1) == pack.labels)[asked]
                    right += hits.tolist()
                    found.append(bool(hits.all()))
            assert cell["loss"] == pytest.approx(sum(losses) / len(losses), rel=TOLERANCE)
            assert cell["tokens_right"] == pytest.approx(sum(right) / len(right))
            assert cell["found"] == sum(found) / len(found)


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_finds_what_one_process_finds(
    name: str, alone: Files, workers: WorkerPool, run: TrainedRun, tmp_path: Path
) -> None:
    found = evaluated(workers, run, tmp_path, *MESHES[name], world_size=2)
    for kind, record in found.items():
        assert record.pop("processes") == 2
        own = dict(alone[kind])
        for axis in ("processes", "tensor", "context", "pipeline", "expert", "checkpoint"):
            record.pop(axis, None)
            own.pop(axis)
        assert_same(record, own, kind)


def assert_same(found: Any, expected: Any, place: str) -> None:
    """Counts, names and hits are equal, losses nearly."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), place
        for key, value in expected.items():
            assert_same(found[key], value, f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{place}.{index}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=10 * TOLERANCE if "perplexity" in place else TOLERANCE), place
    else:
        assert found == expected, place


def test_sequences_share_packs_and_nothing_else(workers: WorkerPool, run: TrainedRun, tmp_path: Path) -> None:
    """Over tensor ranks: losses, hits and first choices of sequences of many lengths; and nothing there to train."""
    model = megatron_m1.load(run.folder)
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(2, 500, (size,), generator=generator).tolist() for size in (1, 5, 64, 33, 2, 30, 17, 64)]
    continued = [model.generate(prompt, max_tokens=3).ids for prompt in ids]
    # What the model itself says is a hit; one token less likely is none.
    sequences = [Scored([*prompt, *new][:-1][-64:], new) for prompt, new in zip(ids, continued, strict=True)]
    sequences += [Scored(ids[2], [*ids[2][1:], 7])]
    found, other = workers.run(
        runs.scored, run.folder, MESHES["tensor"], sequences, tmp_path, world_size=2, process_group=False
    )
    assert found == other | {"trains": found["trains"]}
    assert not any(found["trains"]) and len(found["trains"]) > 10 and not found["dtypes"]
    assert found["done"] == len(sequences)
    assert found["tokens"] == [len(sequence.labels) for sequence in sequences]
    for index, sequence in enumerate(sequences):
        logits = model.logits(sequence.tokens)[-len(sequence.labels) :]
        expected = -logits.double().log_softmax(dim=1).gather(1, torch.tensor(sequence.labels)[:, None]).sum()
        assert found["loss"][index] == pytest.approx(float(expected), rel=TOLERANCE)
        assert found["chosen"][index] == int(logits.argmax(dim=1).sum())
    # Sequences that were cut on the left read another text.
    whole = [index for index, prompt in enumerate(ids) if len(prompt) < 62]
    assert [found["hits"][index] for index in whole] == [3] * len(whole)
    assert found["hits"][-1] < 64


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``said("RUN", "--needle", "3")`` -> the one line with which the command refuses."""
    for name in ("RANK", "WORLD_SIZE", "NNODES", "NODE_RANK", "GPUS_PER_NODE", "SLURM_NNODES", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: object) -> str:
        status = cli.exit_status(lambda: cli.run(["evaluate", *map(str, words)]))
        out, err = capsys.readouterr()
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("megatron-m1: error: ")
        return err

    return run


def test_a_rank_has_as_many_tokens_of_a_pack_as_token_groups() -> None:
    sizes = {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "moe_token_groups": 4}
    config = resolve(parse_config([], [f"--parallel.{name}={size}" for name, size in sizes.items()]), 4, has_gpu=False)
    check_lengths([13], config)
    assert padded_tokens(13, config) == 4 * 4
    with pytest.raises(ValueError, match=r"^a pack of 12 tokens is too short .*moe_token_groups = 4: give 13 or more"):
        check_lengths([13, 12], config)


def test_wrong_calls_get_one_line(said: Callable[..., str], run: TrainedRun, tmp_path: Path) -> None:
    folder = run.folder
    assert "nowhere does not exist" in said("nowhere")
    assert "has no complete one below checkpoints/" in said(tmp_path)
    assert "no validation data: give --data PREFIX" in said(folder, "--data.validation", "[]")
    assert "none.bin does not exist" in said(folder, "--data", tmp_path / "none")
    assert "--train.max_steps changes nothing about an evaluation" in said(folder, "--train.max_steps", 3)
    assert "--model.num_layers changes nothing" in said(folder, "--model.num_layers", 8)
    assert "--depths is for --needle" in said(folder, "--depths", 0.5)
    assert "--limit is for --tasks" in said(folder, "--limit", 5)
    assert "--packs is for the perplexity" in said(folder, "--needle", 100, "--packs", 2)
    assert "--depths has 1.5" in said(folder, "--needle", 100, "--depths", 1.5)
    assert "must have {value} once" in said(folder, "--needle", 100, "--needle-sentence", "{key}")
    assert "write 4000 or 4096" in said(folder, "--needle", "4K")
    context = ["--nproc-per-node", 2, "--parallel.context_parallel_size", 2]
    assert "a pack of 3 tokens is too short for" in said(folder, *context, "--needle", 3)
    assert "the mesh does not divide the world" in said(folder, "--nproc-per-node", 3, *context[2:])
    assert "num_attention_heads = 2 is not divisible" in said(
        folder, "--nproc-per-node", 4, "--parallel.tensor_model_parallel_size", 4
    )
    assert "did you mean --needle?" in said(folder, "--needel", 100)


def test_nobodys_files_are_written_over(said: Callable[..., str], run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "perplexity.json").write_text('{"mine": 1}')
    assert "perplexity.json is no evaluation of megatron-m1" in said(run.folder, "--output", tmp_path)
    (tmp_path / "perplexity.json").unlink()
    (tmp_path / "perplexity.png").write_bytes(b"mine")
    assert "perplexity.png is no picture of megatron-m1's" in said(run.folder, "--output", tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    assert "file" in said(run.folder, "--output", file)


def test_the_page_names_options_that_there_are() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text()
    known = {*command_parser().option_names(), *field_types()}
    named = set(re.findall(r"--([a-z][\w.-]*[a-z_])", page)) - {"parallel"}
    assert {"needle", "tasks", "packs", "data.seq_length"} <= named <= known


def test_a_needle_needs_room(workers: WorkerPool, run: TrainedRun, tmp_path: Path) -> None:
    words = [str(run.folder), "--needle", "9", "--output", str(tmp_path)]
    (line,) = workers.run(runs.refusal, words, tmp_path, world_size=1, process_group=False)
    assert "--needle has a length of 9 tokens, but sentence and question alone take up to" in line
