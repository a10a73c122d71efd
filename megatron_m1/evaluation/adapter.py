"""Our models as lm-eval sees them. Rank 0 runs lm-eval; the others compute what it asks for with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from datasets.exceptions import DatasetsError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_m1.data.tokenizers import Tokenizer
from megatron_m1.evaluation.following import lead, leading
from megatron_m1.evaluation.model import EvaluatedModel
from megatron_m1.evaluation.plan import TasksPlan
from megatron_m1.evaluation.scores import Sums
from megatron_m1.evaluation.sequences import Scored
from megatron_m1.evaluation.tasks import task_manager
from megatron_m1.generate.sampler import generate
from megatron_m1.generate.sampling import Sampling

MAX_NEW_TOKENS = 256
"""Of a generated answer where the task does not say."""
GENERATED_TOGETHER = 16
"""Prompts that one process continues at a time: each has keys and values of its own."""
KNOWN_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}

type Progress = Callable[[str, int], Callable[[int], None]]
"""Called with what is done and how many there are; returns what is called with the number done since the last call."""


class TaskModel(TemplateLM):
    """A model on a mesh, for rank 0's lm-eval.

    A text without context follows the tokenizer's end of a document, since the model has no begin mark. Contexts are
    cut on the left to the model's packs, ``data.seq_length``.

    Args:
        model: on any mesh; the other ranks are in ``follow``.
        tokenizer: the model's.
        progress: shows how far it is.
    """

    def __init__(self, model: EvaluatedModel, tokenizer: Tokenizer, progress: Progress) -> None:
        super().__init__()
        self._model = model
        self._text = tokenizer
        self._progress = progress

    @property
    def eot_token_id(self) -> int:
        """What ends documents."""
        return self._text.eod

    @property
    def max_length(self) -> int:
        """Tokens that are read at most."""
        return self._model.seq_length

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's caches."""
        return self._text.digest()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Ids of a text; there are no special tokens."""
        return self._text.encode(string)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, and whether greedy generation would give them."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        scored = []
        for (_, continuation), context, labels in requests:
            if not labels:
                raise ValueError(f"a task asks for the likelihood of {continuation!r}, which has no token")
            if len(labels) > self.max_length:
                raise ValueError(
                    f"a task asks for the likelihood of {len(labels):,} tokens, but data.seq_length = "
                    f"{self.max_length:,}: raise that"
                )
            scored.append(Scored([*context, *labels][-self.max_length - 1 : -1], labels))
        sums = self._score(scored, "likelihoods")
        return [
            (-loss, hits == tokens)
            for loss, hits, tokens in zip(sums.loss.tolist(), sums.hits.tolist(), sums.tokens.tolist(), strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows where they are longer than the model's packs."""
        scored: list[Scored] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.eot_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, labels in map(make_disjoint_window, windows):
                scored.append(Scored([*context, *labels][:-1], labels))
                owners.append(owner)
        found = [0.0] * len(requests)
        if scored:
            for owner, loss in zip(owners, self._score(scored, "likelihoods").loss.tolist(), strict=True):
                found[owner] -= loss
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts until one of the task's marks, the end of a document, or the most new tokens.

        Raises:
            ValueError: the task asks for what there is not, or for sampling on several processes.
        """
        advance = self._progress("answers", len(requests))
        texts: list[str] = []
        for start in range(0, len(requests), GENERATED_TOGETHER):
            batch = requests[start : start + GENERATED_TOGETHER]
            texts += self._continued([self._prompt(request) for request in batch])
            advance(len(batch))
        return texts

    def _prompt(self, request: Instance) -> _Prompt:
        context, given = request.args
        settings = normalize_gen_kwargs(dict(given), MAX_NEW_TOKENS)
        strange = sorted(settings.keys() - KNOWN_SETTINGS)
        if strange:
            raise ValueError(f"a task generates with {strange[0]}, which is not known here: leave it out of the task")
        most = int(settings["max_gen_toks"])
        if not 0 < most < self.max_length:
            raise ValueError(f"a task generates {most:,} tokens, but data.seq_length = {self.max_length:,}: raise that")
        sampling = Sampling(
            max_tokens=most,
            temperature=float(settings["temperature"]) if settings["do_sample"] else 0.0,
            top_p=float(settings.get("top_p", 1.0)) if settings["do_sample"] else 1.0,
            stop=self.eot_token_id,
        )
        sampling.check()
        # A text of no token follows what comes before every document.
        ids = self.tok_encode(context)[most - self.max_length :] or [self.eot_token_id]
        return _Prompt(ids, tuple(mark for mark in settings["until"] if mark), sampling)

    def _continued(self, prompts: Sequence[_Prompt]) -> list[str]:
        texts = [""] * len(prompts)
        for sampling in dict.fromkeys(prompt.sampling for prompt in prompts):
            own = [index for index, prompt in enumerate(prompts) if prompt.sampling == sampling]
            answers = [_Answer(prompts[index], self._text) for index in own]
            for tokens in self._steps([prompts[index].ids for index in own], answers, sampling):
                for number, token in tokens.items():
                    answers[number].take(token)
                if all(answer.is_whole for answer in answers):
                    break
            for index, answer in zip(own, answers, strict=True):
                texts[index] = answer.text
        return texts

    def _steps(self, ids: list[list[int]], answers: Sequence[_Answer], sampling: Sampling) -> Iterator[dict[int, int]]:
        mesh = self._model.mesh
        if mesh.world_size == 1:
            yield from generate(self._model.chunks[0], ids, sampling)
            return
        if sampling.temperature > 0:
            raise ValueError("a task samples its answers, which one process does: start one, or leave the task out")
        # The states of the layers have one process each; several read the whole sequence for every token.
        ids = [list(sequence) for sequence in ids]
        for _ in range(sampling.max_tokens):
            active = [number for number, answer in enumerate(answers) if not answer.is_whole]
            chosen = self._score([Scored(ids[number], [0]) for number in active]).chosen.tolist()
            tokens = dict(zip(active, chosen, strict=True))
            for number, token in tokens.items():
                ids[number].append(token)
            yield tokens

    def _score(self, scored: list[Scored], what: str | None = None) -> Sums:
        return lead(self._model, scored, self._progress(what, len(scored)) if what else lambda done: None)


class _Prompt:
    """What is continued, until when, and how."""

    def __init__(self, ids: list[int], until: tuple[str, ...], sampling: Sampling) -> None:
        self.ids = ids
        self.until = until
        self.sampling = sampling


class _Answer:
    """What a prompt is continued with so far."""

    def __init__(self, prompt: _Prompt, tokenizer: Tokenizer) -> None:
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self.text = ""
        """Up to the first mark."""
        self.is_whole = False

    def take(self, token: int) -> None:
        """Add a token; what comes after the end is left out."""
        if self.is_whole:
            return
        if token == self._prompt.sampling.stop:
            self.is_whole = True
            return
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        ends = [at for mark in self._prompt.until if (at := text.find(mark)) >= 0]
        self.text = text[: min(ends)] if ends else text
        self.is_whole = bool(ends) or len(self._ids) == self._prompt.sampling.max_tokens


def run_tasks(model: EvaluatedModel, tokenizer: Tokenizer, plan: TasksPlan, progress: Progress) -> dict[str, Any]:
    """Run tasks on rank 0, while the other ranks are in ``follow``.

    Args:
        model: on any mesh.
        tokenizer: its.
        plan: which tasks.
        progress: shows how far it is.

    Returns:
        JSON-able record: for every task its version, its number of questions and examples, and its metrics with their
        standard errors.

    Raises:
        ValueError: a task can't be run; one line.
    """
    with leading():
        found = _evaluated(TaskModel(model, tokenizer, progress), plan)
    return {"limit": plan.limit, "tasks": {name: _task_record(found, name) for name in found["results"]}}


def _evaluated(model: TaskModel, plan: TasksPlan) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = simple_evaluate(
            model,
            tasks=list(plan.names),
            num_fewshot=plan.num_fewshot,
            limit=plan.limit,
            task_manager=task_manager(plan),
            log_samples=False,
        )
    except (OSError, KeyError, DatasetsError) as error:
        raise ValueError(
            f"--tasks {','.join(plan.names)} can't be run by lm-eval: {type(error).__name__}: {error}"
        ) from error
    return found


def _task_record(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in found["results"][name].items():
        metric, _, kept = key.partition(",")
        if not kept or not isinstance(value, int | float):
            continue
        # "none" is lm-eval's name for answers as they are.
        label = metric.removesuffix("_stderr") + ("" if kept == "none" else f" ({kept})")
        (errors if metric.endswith("_stderr") else metrics)[label] = float(value)
    return {
        "version": found["versions"].get(name),
        "examples": found["n-shot"].get(name),
        "questions": found["n-samples"].get(name, {}).get("effective", 0),
        "metrics": metrics,
        "standard_errors": errors,
    }
