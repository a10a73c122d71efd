"""A tokenised corpus that every Python has the text of."""

from __future__ import annotations

import argparse
import ast
import bdb
import calendar
import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.data.tokenizers import load_tokenizer, train_sentencepiece
from tests.data.corpora import write_corpus

SOURCES = [argparse, ast, bdb]


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """``data`` settings of a run: a tokenizer of 500 pieces, documents of 20 to 150 tokens, some of them held out."""
    folder = tmp_path_factory.mktemp("tiny_corpus")
    texts = [inspect.getsource(module) for module in SOURCES]
    train_sentencepiece(texts, folder / "tokenizer.model", vocab_size=500)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    tokens = itertools.chain.from_iterable(tokenizer.encode(text) for text in texts)
    lengths = itertools.cycle([37, 90, 149, 20, 120])
    documents = []
    while document := list(itertools.islice(tokens, next(lengths))):
        documents.append([*document, tokenizer.eod])
    digest = tokenizer.digest()
    return {
        "train": [write_corpus(folder / "train", documents[:-20], tokenizer_digest=digest)],
        "validation": [write_corpus(folder / "held_out", documents[-20:], tokenizer_digest=digest)],
        "tokenizer": str(folder / "tokenizer.model"),
    }


@pytest.fixture(scope="session")
def second_corpus(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: dict[str, Any]) -> str:
    """Prefix of a further corpus of that tokenizer: documents of 61 tokens."""
    tokenizer = load_tokenizer(Path(tiny_corpus["tokenizer"]))
    tokens = tokenizer.encode(inspect.getsource(calendar))
    documents = [[*piece, tokenizer.eod] for piece in itertools.batched(tokens, 60)]
    folder = tmp_path_factory.mktemp("second_corpus")
    return write_corpus(folder / "more", documents, tokenizer_digest=tokenizer.digest())
