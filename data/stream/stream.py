"""The stream of a run's packs: which source gives the next one, and what is in it.

It is planned from the lengths of documents alone, on every rank the same; a rank reads only its own packs. What came
so far is a small state of JSON values, from which the stream goes on, with another mesh, batch size or blend as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from megatron_m1.data.corpora.blend import check_blend, repeated_corpora
from megatron_m1.data.corpora.ids import check_token_ids
from megatron_m1.data.packed import PackedSample
from megatron_m1.data.packed.dataset import TokenizerFacts
from megatron_m1.data.stream.best_fit import BestFit
from megatron_m1.data.stream.caps import token_limit
from megatron_m1.data.stream.chop import Chop
from megatron_m1.data.stream.corpus import Corpus, open_corpus
from megatron_m1.data.stream.credits import Credits
from megatron_m1.data.stream.plan import Filling, PackPlan
from megatron_m1.data.stream.reading import read_pack
from megatron_m1.data.stream.supply import Supply
from megatron_m1.printing import counted

type Packing = Literal["chop", "best_fit"]


class Packer(Protocol):
    """Makes packs of one source."""

    @property
    def is_used_up(self) -> bool:
        """Whether there is no further pack."""

    def fill(self, length: int) -> Filling:
        """The next pack."""

    def held(self) -> list[tuple[int, int, int]]:
        """Document, first token and end of what was drawn and not given."""


PACKERS: dict[str, Callable[[Supply, Sequence[tuple[int, int, int]]], Packer]] = {"chop": Chop, "best_fit": BestFit}


@dataclass(frozen=True)
class StreamConfig:
    """What decides the packs, besides the weights and what came before."""

    prefixes: Sequence[str]
    """Of tokenised corpora, none twice."""
    sequence_length: int
    """Tokens of a pack, at least 2."""
    packing: Packing = "chop"
    """chop fills every pack and cuts documents where it ends; best_fit cuts none that a pack can hold, and pads."""
    seed: int = 1234
    """Of the documents' order."""
    reset_at_documents: bool = True
    """False makes each pack one document (padding stays apart), and no label is masked for being of another."""
    max_epochs: Mapping[str, float] = field(default_factory=dict)
    """How often the run may see a corpus, by prefix, from its start on; one that is not named has no cap. No document
    is begun once so many tokens were given. Names that are no prefix here, such as another stage's, say nothing."""


@dataclass(frozen=True)
class StreamCounts:
    """What was given since the run began."""

    packs: int
    tokens: dict[str, int]
    """Of documents, by prefix, for the stream's own sources."""
    epochs: dict[str, float]
    """``tokens`` by those of the corpus."""
    padding: int
    """Tokens at the ends of packs, of all sources ever."""
    documents: int
    """Begun, of all sources ever; a document counts again in every epoch."""
    cut_documents: int
    """Those of them that did not end in the pack in which they began."""


class _Source:
    """A corpus of the stream with its cursor and its packer."""

    def __init__(self, corpus: Corpus, config: StreamConfig, record: Mapping[str, Any]) -> None:
        self.corpus = corpus
        self.given = int(record.get("given", 0))
        self.is_told = bool(record.get("told", False))
        limit = token_limit(corpus.prefix, corpus.tokens, config.max_epochs)
        self.supply = Supply(corpus, seed=config.seed, limit=limit, state=record.get("supply"))
        self._packing = config.packing
        held = [(int(document), int(start)) for document, start in record.get("held", ())]
        if record.get("packing") != config.packing:
            self.supply.give_back(held)
            held = []
        self.packer = PACKERS[config.packing](
            self.supply, [(document, start, int(corpus.lengths[document])) for document, start in held]
        )

    def record(self, credit: float) -> dict[str, Any]:
        """For ``__init__``, as JSON values."""
        return {
            "prefix": self.corpus.prefix,
            "given": self.given,
            "told": self.is_told,
            "credit": credit,
            "packing": self._packing,
            "held": [[document, start] for document, start, _ in self.packer.held()],
            "supply": self.supply.state(),
        }


class Stream:
    """Packs in their final order; made by :func:`open_stream`."""

    def __init__(
        self,
        config: StreamConfig,
        corpora: Sequence[Corpus],
        weights: Callable[[int], Sequence[float]],
        state: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> None:
        self.config = config
        self._weights, self._note = weights, note
        self._records: dict[str, Any] = dict(state.get("sources", {}))
        """Of all sources ever, by content; those of ``_sources`` as they were at the start."""
        found = [self._records.get(corpus.content, {}) for corpus in corpora]
        self._sources = [_Source(corpus, config, record) for corpus, record in zip(corpora, found, strict=True)]
        self._credits = Credits([float(record.get("credit", 0.0)) for record in found])
        self._packs, self._padding = int(state.get("packs", 0)), int(state.get("padding", 0))
        self._documents, self._cut = int(state.get("documents", 0)), int(state.get("cut_documents", 0))

    def take(self, count: int, *, tokens: int) -> list[PackPlan]:
        """Advance by ``count`` packs, on every rank the same.

        It looks at lengths only: some microseconds a pack and, for best_fit, a document. Lengths are read through the
        mapped .idx files, 4 bytes a document in no order, so that they should fit into the page cache.

        Args:
            count: packs of a step, of all ranks.
            tokens: that the run has taken before them, padding among them: a pack counts as its length.

        Raises:
            ValueError: every source that has a weight is used up.
        """
        length = self.config.sequence_length
        plans = []
        for first in range(tokens, tokens + count * length, length):
            index = self._choose(first)
            source = self._sources[index]
            plan = PackPlan(index, source.corpus.prefix, source.packer.fill(length), length)
            self._count(plan)
            plans.append(plan)
        return plans

    def read(self, plan: PackPlan) -> PackedSample:
        """Read a pack; any plan of this stream, in any order.

        Labels and masks are as of ``packed.PackedDataset``: a label counts if it is the next token of the same
        document, the one after the pack's last token too, which is in another pack. Where the corpus has a file of
        loss masks, a label counts only if that says so. Padding, at the end, is a document of zeros without a label
        that counts.
        """
        corpus = self._sources[plan.source].corpus
        return read_pack(plan, corpus, reset_at_documents=self.config.reset_at_documents)

    def state(self) -> dict[str, Any]:
        """All that ``open_stream`` needs to go on, as JSON values, whatever the corpora's sizes and the tokens so far.

        A source, also one of earlier stages, has a record of some 500 bytes and up to 1,024 pairs of numbers for
        documents that wait, 128 if no stage packed by best fit: 25 KB of JSON at most, mostly less than 3.
        """
        own = zip(self._sources, self._credits.credits, strict=True)
        records = {source.corpus.content: source.record(credit) for source, credit in own}
        return {
            "packs": self._packs,
            "padding": self._padding,
            "documents": self._documents,
            "cut_documents": self._cut,
            "sources": self._records | records,
        }

    def counts(self) -> StreamCounts:
        """What was taken so far, in this stream and in those whose state it goes on from."""
        corpora = [(source.corpus.prefix, source.given, source.corpus.tokens) for source in self._sources]
        return StreamCounts(
            self._packs,
            {prefix: given for prefix, given, _ in corpora},
            {prefix: given / tokens for prefix, given, tokens in corpora},
            self._padding,
            self._documents,
            self._cut,
        )

    def _choose(self, tokens: int) -> int:
        usable = [not source.packer.is_used_up for source in self._sources]
        weights = self._weights(tokens)
        for source, use, weight in zip(self._sources, usable, weights, strict=True):
            if not use and weight > 0.0 and not source.is_told:
                source.is_told = True
                epochs = _counted_epochs(source)
                self._note(f"{source.corpus.prefix} is used up after {epochs}: the other corpora take its weight")
        index = self._credits.choose(weights, usable)
        if index is None:
            used_up = ", ".join(f"{source.corpus.prefix} after {_counted_epochs(source)}" for source in self._sources)
            raise ValueError(
                f"after {tokens:,} tokens no corpus with a weight has a document left that data.max_epochs allows "
                f"({used_up}): raise it, add a corpus, or train fewer tokens"
            )
        return index

    def _count(self, plan: PackPlan) -> None:
        pieces, tokens = plan.filling.pieces, plan.tokens
        self._sources[plan.source].given += tokens
        self._packs += 1
        self._padding += plan.length - tokens
        self._documents += int(np.count_nonzero(pieces.starts == 0))
        self._cut += int(plan.filling.is_cut and pieces.starts[-1] == 0)


def _counted_epochs(source: _Source) -> str:
    """Such as ``1 epoch`` or ``2.5 epochs``."""
    epochs = source.given / source.corpus.tokens
    return counted(int(epochs), "epoch") if epochs == int(epochs) else f"{epochs:.4g} epochs"


def open_stream(
    config: StreamConfig,
    *,
    tokenizer: TokenizerFacts,
    weights: Callable[[int], Sequence[float]],
    state: Mapping[str, Any] | None,
    note: Callable[[str], None],
    cache_folder: str | Path | None = None,
) -> Stream:
    """Open the stream of packs, at its start or where another one stands. Nothing is built, whatever its size.

    A stream of the same corpora, length, packing and seed goes on bit for bit, wherever the corpora lie now. Another
    one gives all that the old one had drawn and not given, before its sources' cursors go on: no document comes twice
    before its source's epoch ends. An epoch that has begun keeps the seed with which it began.

    Args:
        config: what decides the packs.
        tokenizer: the one that made the corpora.
        weights: tokens of the run before a pack -> the weight of each of ``config.prefixes``, at least 0; they need
            not sum to 1. Asked once a pack. The shares of packs follow to within a pack of each source.
        state: as :meth:`Stream.state` gave it, of this stream or another; None begins. Sources that are not in
            ``config.prefixes`` are kept in it for later stages.
        note: takes one line, said once in a run, when a source is used up.
        cache_folder: keeps what was found in the corpora, as for ``check_token_ids``, which reads each once; None
            leaves their ids unchecked.

    Raises:
        ValueError: bad numbers, a damaged corpus, one that stands there twice, one made with another tokenizer or with
            ids that the tokenizer does not have, a damaged state, or a cache folder that can't be written; one line.
        FileNotFoundError: a .bin or .idx is missing.
    """
    if config.sequence_length < 2:
        raise ValueError(f"sequence_length is {config.sequence_length}; a pack needs at least 2 tokens")
    if config.packing not in PACKERS:
        raise ValueError(f"data.packing is {config.packing!r}: give {' or '.join(PACKERS)}")
    blend = [item for prefix in config.prefixes for item in ("1", prefix)]
    for again, first in repeated_corpora(blend):
        raise ValueError(f"{again} is {first} again: name a corpus once, with the sum of the weights")
    check_blend(blend, tokenizer_digest=tokenizer.digest())
    if cache_folder is not None:
        try:
            check_token_ids(config.prefixes, vocab_size=tokenizer.vocab_size, cache_folder=Path(cache_folder))
        except OSError as error:
            raise ValueError(
                f"data.cache_folder {cache_folder} can't be written: {error.strerror or error}; choose another folder"
            ) from error
    corpora = [open_corpus(prefix) for prefix in config.prefixes]
    try:
        return Stream(config, corpora, weights, state or {}, note)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"the state of the data's stream is damaged ({error!r}): take an earlier checkpoint"
        ) from error
