"""Needles in haystacks: a sentence hidden in a long text, and a question at its end that only this sentence answers.

The answer is scored by teacher forcing: it counts as found if each of its tokens is the most likely one after the text,
the question and the tokens before it. That is when greedy generation would have given it, and it costs one pass on any
mesh.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from megatron_m1.data.corpora.prefix import open_tokens
from megatron_m1.data.packed import PackedSample
from megatron_m1.data.tokenizers import Tokenizer
from megatron_m1.evaluation.model import EvaluatedModel
from megatron_m1.evaluation.plan import NeedlePlan
from megatron_m1.evaluation.scores import NOWHERE, sums_by_cell, with_cells
from megatron_m1.printing import counted

KEYS = ("river", "mountain", "engine", "garden", "window", "letter", "bridge", "candle", "forest", "harbour", "island")
DIGITS = 7
"""Of a value."""


class Haystack:
    """Text of corpora end to end, without the marks that end documents; it begins anew where it ends."""

    def __init__(self, prefixes: Sequence[str], eod: int) -> None:
        self._corpora = [open_tokens(prefix)[0] for prefix in prefixes]
        self._eod = eod
        self.tokens = sum(len(corpus) for corpus in self._corpora)
        """Of all corpora, with the marks."""
        if all(bool((corpus[: 1 << 20] == eod).all()) for corpus in self._corpora):
            raise ValueError(
                f"{', '.join(prefixes)}: a haystack needs a corpus with text, this begins with end marks only"
            )

    def cut(self, start: int, length: int) -> list[int]:
        """Take ``length`` tokens from token ``start`` on."""
        taken: list[int] = []
        while len(taken) < length:
            part = self._read(start % self.tokens, length - len(taken))
            taken += part[part != self._eod].tolist()
            start += len(part)
        return taken

    def _read(self, start: int, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        for corpus in self._corpora:
            if start < len(corpus):
                return corpus[start : start + length].astype(np.int64)
            start -= len(corpus)
        raise AssertionError(start)


@dataclass(frozen=True)
class Hidden:
    """A needle, its question and its answer, as ids."""

    question: list[int]
    answer: list[int]
    rest: list[int]
    """Of the sentence, after the answer."""

    @property
    def sentence(self) -> list[int]:
        """What is hidden. The answer has the ids that are asked for, whatever stands around it."""
        return [*self.question, *self.answer, *self.rest]


def hide(plan: NeedlePlan, tokenizer: Tokenizer, chance: random.Random) -> Hidden:
    """Draw a key and a value.

    Raises:
        ValueError: the tokenizer makes nothing of a part of the sentence.
    """
    key, value = chance.choice(KEYS), "".join(chance.choice("123456789") for _ in range(DIGITS))
    before, _, after = plan.sentence.replace("{key}", key).partition("{value}")
    # Most tokenizers join a space with what follows it.
    question = before.rstrip()
    hidden = Hidden(
        tokenizer.encode(f"\n{question}"),
        tokenizer.encode(before[len(question) :] + value),
        tokenizer.encode(f"{after}\n"),
    )
    if not hidden.question or not hidden.answer:
        raise ValueError(f"the tokenizer makes no tokens of {plan.sentence!r}: give another --needle-sentence")
    return hidden


class NeedlePacks:
    """Packs of one length, ``plan.samples`` at every depth. A sample's needle and haystack are those of all depths."""

    def __init__(self, plan: NeedlePlan, length: int, haystack: Haystack, tokenizer: Tokenizer) -> None:
        self._plan = plan
        self._length = length
        self._haystack = haystack
        chances = [random.Random(f"{plan.seed} {length} {sample}") for sample in range(plan.samples)]
        self.hidden = [hide(plan, tokenizer, chance) for chance in chances]
        self._starts = [chance.randrange(haystack.tokens) for chance in chances]
        self.cases = list(product(plan.depths, range(plan.samples)))
        least = max(len(hidden.sentence) + len(hidden.question) + len(hidden.answer) for hidden in self.hidden)
        if length < least:
            raise ValueError(
                f"--needle has a length of {counted(length, 'token')}, but sentence and question alone take up to "
                f"{least}: give a longer one"
            )

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> PackedSample:
        depth, sample = self.cases[index]
        hidden = self.hidden[sample]
        end = [*hidden.question, *hidden.answer]
        # One token more than the pack has: the last one is a label only.
        room = self._length + 1 - len(hidden.sentence) - len(end)
        hay = self._haystack.cut(self._starts[sample], room)
        at = round(depth * room)
        ids = torch.tensor([*hay[:at], *hidden.sentence, *hay[at:], *end])
        cells = torch.full((self._length, 1), NOWHERE)
        cells[-len(hidden.answer) :] = index
        mask = (cells[:, 0] != NOWHERE).float()
        whole = torch.tensor([0, self._length], dtype=torch.int32)
        return with_cells(PackedSample(ids[:-1], ids[1:], mask, whole), cells)


def needle_retrieval(
    model: EvaluatedModel,
    plan: NeedlePlan,
    haystack: Haystack,
    tokenizer: Tokenizer,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Look for needles at every length and depth. Collective.

    Args:
        model: on any mesh.
        plan: what is hidden where.
        haystack: the text around it.
        tokenizer: the model's.
        advance: as of ``sums_by_cell``.

    Returns:
        JSON-able record, the same on every rank: for every length and depth the share of ``found`` answers, the share
        of their tokens that are right, and their loss in nats per token.

    Raises:
        ValueError: a length has no room for the sentence and its question.
    """
    all_packs = [NeedlePacks(plan, length, haystack, tokenizer) for length in plan.lengths]
    cells = []
    for length, packs in zip(plan.lengths, all_packs, strict=True):
        sums = sums_by_cell(model.with_length(length), packs, len(packs), advance)
        for depth in plan.depths:
            own = torch.tensor([index for index, case in enumerate(packs.cases) if case[0] == depth])
            tokens, hits = sums.tokens[own], sums.hits[own]
            cells.append(
                {
                    "length": length,
                    "depth": depth,
                    "samples": len(own),
                    "found": float((tokens == hits).double().mean()),
                    "tokens_right": float(hits.sum() / tokens.sum()),
                    "loss": float(sums.loss[own].sum() / tokens.sum()),
                }
            )
    return {
        "found": sum(cell["found"] for cell in cells) / len(cells),
        "sentence": plan.sentence,
        "seed": plan.seed,
        "haystack_tokens": haystack.tokens,
        "cells": cells,
    }
