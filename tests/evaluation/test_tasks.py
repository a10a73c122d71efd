"""Local tasks through lm-eval, without a network, against transformers' own model with the same weights."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import MiniMaxForCausalLM

from megatron_m1.data.tokenizers import Tokenizer, load_tokenizer
from megatron_m1.evaluation.plan import TasksPlan
from megatron_m1.evaluation.tasks import check_tasks
from megatron_m1.runtime.pool import WorkerPool
from tests.evaluation import evaluation_runs as runs
from tests.evaluation.conftest import TrainedRun
from tests.evaluation.test_evaluate import said
from tests.reference.transformers_minimax import build

__all__ = ["said"]

LENGTH = 32
"""Tokens that the model reads at most; the longest text is longer."""
NEW_TOKENS = 4
TOLERANCE = 1e-4
"""Relative: the project's model against transformers'."""
CHOICES: list[dict[str, Any]] = [
    {"question": "def main", "choices": ["(self):", " import", "xyz"], "answer": 0},
    {"question": "import ", "choices": ["os", "argparse\n"], "answer": 1},
    {"question": "", "choices": ["class", "return", "    if"], "answer": 2},
]
TEXTS = ["import os\n", "def main(self):\n    return self.value\n" * 4]
PROMPTS = [
    "def main",
    "import",
    "return self.parser.add_argument('--quiet', action='store_true', help='be quiet')\n" * 2,
]


@dataclass(frozen=True)
class Truth:
    """transformers' model and the tokenizer that goes with it."""

    model: MiniMaxForCausalLM
    tokenizer: Tokenizer

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """fp64 [n, vocabulary]."""
        return self.model(torch.tensor([ids])).logits[0].double()

    def likelihood(self, context: list[int], labels: list[int]) -> tuple[float, bool]:
        """Of labels after a context, and whether they are what greedy generation would give."""
        logits = self.logits([*context, *labels][:-1])[-len(labels) :]
        picked = logits.log_softmax(dim=1).gather(1, torch.tensor(labels)[:, None])
        return float(picked.sum()), logits.argmax(dim=1).tolist() == labels

    def pair(self, context: str, continuation: str) -> tuple[float, bool]:
        """The same of texts: spaces at the context's end belong to what follows, as lm-eval has it."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.tokenizer.encode(context)
        labels = self.tokenizer.encode(context + continuation)[len(before) :]
        return self.likelihood(before or [self.tokenizer.eod], labels)

    def rolling(self, text: str) -> float:
        """Of a whole text: windows of ``LENGTH`` labels, the last one with as much context as fits."""
        ids = [self.tokenizer.eod, *self.tokenizer.encode(text)]
        total = 0.0
        for start in range(1, len(ids), LENGTH):
            stop = min(start + LENGTH, len(ids))
            total += self.likelihood(ids[min(start, max(1, stop - LENGTH)) - 1 : start], ids[start:stop])[0]
        return total

    def greedy(self, prompt: str) -> str:
        """The prompt continued."""
        ids = self.tokenizer.encode(prompt)[NEW_TOKENS - LENGTH :]
        new: list[int] = []
        while len(new) < NEW_TOKENS:
            token = int(self.logits([*ids, *new])[-1].argmax())
            if token == self.tokenizer.eod:
                break
            new.append(token)
        return self.tokenizer.decode(new)


@dataclass(frozen=True)
class Tasks:
    """A folder of tasks, a Hugging Face folder, and where its checkpoint will lie."""

    folder: Path
    model: Path
    output: Path
    cache: Path
    tokenizer: Path
    truth: Truth

    def words(self, source: Path, *names: str) -> list[str]:
        words = [str(source), "--tasks", ",".join(names), "--include-path", str(self.folder)]
        return [*words, "--tokenizer", str(self.tokenizer), "--data.seq_length", str(LENGTH)]


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **settings}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def metrics(*names: str) -> list[dict[str, str]]:
    return [{"metric": name} for name in names]


@pytest.fixture(scope="module")
def tasks(run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    """Tasks of every kind of request, and a random model of 504 ids."""
    root = tmp_path_factory.mktemp("tasks")
    sizes: dict[str, Any] = dict(layers=2, hidden=32, heads=4, kv_heads=2, head_dim=16, ffn=24, experts=3, vocab=504)
    model = build(**sizes, rotary_dim=16, rope_theta=1e4, softmax_every=2, alpha=1.7, seed=4)
    model.save_pretrained(root / "hf")
    truth = Truth(model, load_tokenizer(run.tokenizer))
    folder = root / "tasks"
    folder.mkdir()
    asked = {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    write_task(
        folder,
        "choose",
        CHOICES,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        metric_list=metrics("acc"),
        target_delimiter="",
    )
    # The first answer is what the model says, the second is not.
    said = truth.greedy(PROMPTS[0])
    finals = [{"question": PROMPTS[0], "answer": first} for first in (said, "zz")]
    settings: dict[str, Any] = {"output_type": "loglikelihood", "target_delimiter": "", **asked}
    write_task(folder, "final", finals, metric_list=metrics("perplexity", "acc"), **settings)
    texts = [{"text": text} for text in TEXTS]
    settings = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    write_task(folder, "roll", texts, metric_list=metrics("byte_perplexity", "bits_per_byte"), **settings)
    answers = [{"question": prompt, "answer": truth.greedy(prompt)} for prompt in PROMPTS]
    answers.append({"question": PROMPTS[0], "answer": "something else"})
    settings = {"output_type": "generate_until", "target_delimiter": "", **asked}
    until = {"until": ["\n\n\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    write_task(folder, "write", answers, generation_kwargs=until, metric_list=metrics("exact_match"), **settings)
    sampled = {**until, "do_sample": True, "temperature": 1.0}
    write_task(folder, "sample", answers, generation_kwargs=sampled, metric_list=metrics("exact_match"), **settings)
    beams = {**until, "num_beams": 4}
    write_task(folder, "beams", answers, generation_kwargs=beams, metric_list=metrics("exact_match"), **settings)
    return Tasks(folder, root / "hf", root / "results", root / "cache", run.tokenizer, truth)


NAMES = ("choose", "final", "roll", "write")


@pytest.fixture(scope="module")
def found(workers: WorkerPool, tasks: Tasks) -> dict[str, Any]:
    """What one process finds of the Hugging Face folder."""
    words = [*tasks.words(tasks.model, *NAMES), "--output", str(tasks.output)]
    ((status, printed),) = workers.run(runs.evaluate, words, tasks.cache, world_size=1, process_group=False)
    assert status == 0 and "byte_perplexity" in printed
    return runs.record(tasks.output, "tasks")


def test_likelihoods_are_those_of_transformers(found: dict[str, Any], tasks: Tasks) -> None:
    truth = tasks.truth
    picked = []
    for row in CHOICES:
        likelihoods = [truth.pair(row["question"], choice)[0] for choice in row["choices"]]
        picked.append(likelihoods.index(max(likelihoods)) == row["answer"])
    choose, final = (found["tasks"][name] for name in ("choose", "final"))
    assert choose["questions"] == len(CHOICES) and choose["examples"] == 0
    assert choose["metrics"]["acc"] == pytest.approx(sum(picked) / len(picked))
    pairs = [truth.pair(PROMPTS[0], answer) for answer in (truth.greedy(PROMPTS[0]), "zz")]
    assert final["metrics"]["perplexity"] == pytest.approx(
        math.exp(-sum(likelihood for likelihood, _ in pairs) / 2), rel=TOLERANCE
    )
    assert final["metrics"]["acc"] == sum(is_greedy for _, is_greedy in pairs) / 2


def test_whole_texts_are_scored_in_windows(found: dict[str, Any], tasks: Tasks) -> None:
    assert len(tasks.truth.tokenizer.encode(TEXTS[1])) > LENGTH
    total = sum(map(tasks.truth.rolling, TEXTS))
    size = sum(len(text.encode()) for text in TEXTS)
    metrics = found["tasks"]["roll"]["metrics"]
    assert metrics["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=TOLERANCE)
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=TOLERANCE)


def test_answers_are_what_transformers_generates(found: dict[str, Any]) -> None:
    assert found["tasks"]["write"]["metrics"]["exact_match"] == len(PROMPTS) / (len(PROMPTS) + 1)


def test_two_processes_find_the_same(found: dict[str, Any], workers: WorkerPool, tasks: Tasks, tmp_path: Path) -> None:
    """Of the checkpoint that the first evaluation has made, over context-parallel ranks."""
    checkpoint = Path(found["checkpoint"])
    assert checkpoint.parent.parent == tasks.output / "initial"
    context = ["--output", str(tmp_path), "--parallel.context_parallel_size", "2"]
    words = [*tasks.words(checkpoint, *NAMES), *context]
    said = workers.run(runs.evaluate, words, tasks.cache, world_size=2, process_group=False)
    assert [status for status, _ in said] == [0, 0] and said[1][1] == ""
    other = runs.record(tmp_path, "tasks")
    for name in NAMES:
        for metric, value in found["tasks"][name]["metrics"].items():
            assert other["tasks"][name]["metrics"][metric] == pytest.approx(value, rel=TOLERANCE), metric
    words = [*tasks.words(checkpoint, "sample"), *context]
    lines = workers.run(runs.refusal, words, tasks.cache, world_size=2, process_group=False)
    assert len(set(lines)) == 1 and "samples its answers, which one process does" in lines[0]


def test_settings_that_are_not_known_are_refused(
    found: dict[str, Any], workers: WorkerPool, tasks: Tasks, tmp_path: Path
) -> None:
    words = [*tasks.words(Path(found["checkpoint"]), "beams"), "--output", str(tmp_path)]
    (line,) = workers.run(runs.refusal, words, tasks.cache, world_size=1, process_group=False)
    assert line == "a task generates with num_beams, which is not known here: leave it out of the task"


def test_a_task_that_nobody_knows(tasks: Tasks, run: TrainedRun, said: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown task hellaswga: did you mean hellaswag"):
        check_tasks(TasksPlan(("choose", "hellaswga"), tasks.folder))
    assert "is no folder" in said(run.folder, "--tasks", "choose", "--include-path", tmp_path / "nowhere")


def test_without_lm_eval(run: TrainedRun, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = said(run.folder, "--tasks", "choose")
    assert line.endswith("--tasks needs lm-eval, which is not installed: pip install 'megatron-m1[eval]'\n")
