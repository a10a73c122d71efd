"""The embedded corpus: real text without a network, for the run that proves an installation.

Two sources, each with a held-out part: code (the standard library's functions and classes) and prose (its documentation
and installed packages' documents).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path

from megatron_m1.data.corpora.prefix import check_prefix
from megatron_m1.data.demo.sources import prose_texts, sections, standard_library
from megatron_m1.data.tokenizers import check_vocab_size, load_tokenizer, train_sentencepiece
from megatron_m1.files import file_lock, write_atomically

SHARES = {"code": 0.7, "prose": 0.3}
"""Sources and their shares of packs."""
MAX_VOCAB_SIZE = 16_384
"""More pieces than that the corpus cannot teach."""
_HELD_OUT = 20
"""One document in so many is held out."""
_LONG_PARAGRAPH = 60
"""Letters from which a paragraph counts as content rather than as a heading."""
_TRAINING_CHARACTERS = 6_000_000
"""Of text that the tokenizer is trained on."""
_NO_LETTERS = re.compile(r"[^a-z]+")


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus that is ready to train on."""

    tokenizer: Path
    """SentencePiece model."""
    train: list[str]
    """Blend: weight, prefix, weight, prefix."""
    validation: list[str]
    """Held-out blend."""


def find_corpus(folder: str | Path, *, vocab_size: int) -> PreparedCorpus | None:
    """Return what :func:`prepare_corpus` would with these arguments, or None when something of it is not there yet."""
    prepared = _locate(Path(folder), vocab_size)
    return None if _missing_prefixes(prepared) else prepared


def vocabulary_notes(folder: str | Path | None, tokenizer: str, vocab_size: int) -> list[str]:
    """Say in a line where a model has more rows than the embedded corpus' tokenizer has tokens.

    Args:
        folder: of the corpus, if a run has one.
        tokenizer: that of the run; empty takes the embedded one.
        vocab_size: rows of the embedding.
    """
    if folder is None or vocab_size <= MAX_VOCAB_SIZE or (tokenizer and not _is_from(tokenizer, Path(folder))):
        return []
    return [
        f"note: model.vocab_size is {vocab_size:,}, but the embedded corpus' tokenizer has {MAX_VOCAB_SIZE:,} tokens "
        f"at most: the other rows are never trained; --model.vocab_size {MAX_VOCAB_SIZE} leaves them out, a tokenizer "
        "and data of your own fill them"
    ]


def check_own_data(folder: str | Path, *, train: Sequence[str], validation: Sequence[str], tokenizer: str) -> None:
    """Check that what a run names itself goes with what it takes from the embedded corpus, before that is built.

    Args:
        folder: of the embedded corpus.
        train: the run's own blend; empty takes the embedded one.
        validation: its own held-out blend, the same.
        tokenizer: its own tokenizer; empty takes the embedded one, with which own data can be made as well.

    Raises:
        ValueError: one blend is its own and the other the embedded corpus', whose ids are another tokenizer's.
    """
    if not tokenizer or (train and validation) or _is_from(tokenizer, Path(folder)):
        return
    if not train:
        raise ValueError(
            f"data.tokenizer = {tokenizer} is your own, but data.train is empty, and the embedded corpus has its own "
            "tokenizer: name data.train as well, or leave data.tokenizer out"
        )
    raise ValueError(
        "data.train is your own, but data.validation is empty, and the embedded corpus' held-out part has another "
        "tokenizer: hold out a part of yours (megatron-m1 tokenize --split 0.99,0.01 writes PREFIX and "
        "PREFIX_validation) and name it in data.validation, or go without by --data.embedded_corpus none"
    )


def _is_from(tokenizer: str, folder: Path) -> bool:
    """Whether a tokenizer is one of the corpus, or a copy."""
    path = Path(tokenizer)
    if path.resolve().is_relative_to(folder.resolve()):
        return True
    return path.is_file() and any(cmp(path, own, shallow=False) for own in folder.glob("bpe-*/tokenizer.model"))


def _silent(line: str) -> None:
    """Show nothing."""


def prepare_corpus(
    folder: str | Path, *, vocab_size: int, workers: int = 1, note: Callable[[str], None] = _silent
) -> PreparedCorpus:
    """Build the corpus, train a tokenizer on it, tokenise it. What a former call finished is reused.

    Any number of processes may call it at once: one builds, the others wait. That needs a file system whose locks
    reach all of them; on several machines let one process call it first.

    Args:
        folder: made if missing; gets the four JSONL files and one subfolder a vocabulary size.
        vocab_size: pieces of the tokenizer, at most; more than 16,384 become 16,384.
        workers: processes that tokenise.
        note: gets a line when each of the three parts begins.

    Raises:
        ValueError: too small a vocabulary, a Python without the sources of its library, or files of the corpus's names
            that it did not make.
        OSError: the folder cannot be written.
    """
    check_vocab_size(vocab_size)
    folder = Path(folder)
    prepared = _locate(folder, vocab_size)
    tokenizer = prepared.tokenizer
    if not _missing_prefixes(prepared):
        return prepared
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / "corpus.lock"):
        if not (folder / "corpus.json").exists():
            note(f"building the embedded corpus in {folder}")
            _build_first(folder)
        tokenizer.parent.mkdir(exist_ok=True)
        if not tokenizer.exists():
            note(f"training a SentencePiece tokenizer of {min(vocab_size, MAX_VOCAB_SIZE):,} tokens")
            train_sentencepiece(_training_texts(folder), tokenizer, vocab_size=min(vocab_size, MAX_VOCAB_SIZE))
        if missing := _missing_prefixes(prepared):
            # megatron-core takes seconds to import, which a finished corpus need not cost.
            from megatron_m1.data.tokenize import tokenize_corpus

            note(f"tokenising {len(missing)} file{'s' if len(missing) > 1 else ''}")
            for prefix in missing:
                name = Path(prefix).name
                processes = workers if name.endswith(".train") else 1
                tokenize_corpus([folder / f"{name}.jsonl"], prefix, tokenizer, workers=processes)
    return prepared


def _locate(folder: Path, vocab_size: int) -> PreparedCorpus:
    """Paths of a corpus, whether or not it is there."""
    tokenised = folder / f"bpe-{min(vocab_size, MAX_VOCAB_SIZE)}"

    def blend(split: str) -> list[str]:
        return [item for source, share in SHARES.items() for item in (str(share), str(tokenised / f"{source}.{split}"))]

    return PreparedCorpus(tokenised / "tokenizer.model", blend("train"), blend("validation"))


def _missing_prefixes(prepared: PreparedCorpus) -> list[str]:
    """Prefixes that are not there, damaged, or made with another tokenizer."""
    prefixes = prepared.train[1::2] + prepared.validation[1::2]
    if not prepared.tokenizer.exists():
        return prefixes
    digest = load_tokenizer(prepared.tokenizer).digest()
    missing = []
    for prefix in prefixes:
        try:
            check_prefix(prefix, tokenizer_digest=digest)
        except (FileNotFoundError, ValueError):
            missing.append(prefix)
    return missing


def _build_first(folder: Path) -> None:
    """``build_corpus`` where nobody's file of the same name is replaced; what a killed build left there may be."""
    building = folder / "corpus.building"
    taken = [path for source in SHARES for path in sorted(folder.glob(f"{source}.*.jsonl"))]
    if taken and not building.exists():
        raise ValueError(f"{taken[0]} is there, and not by the embedded corpus: choose another data.embedded_corpus")
    building.touch()
    build_corpus(folder)
    building.unlink()


def build_corpus(folder: Path) -> dict[str, int]:
    """Write ``{code,prose}.{train,validation}.jsonl`` and, when they are whole, ``corpus.json`` with their counts.

    The same installation gives the same files. No text comes twice, letters alone compared: a licence that a hundred
    packages carry is there once, and nothing held out is in a training file.

    Args:
        folder: an existing folder.

    Returns:
        Documents by file name.

    Raises:
        ValueError: this Python comes without the sources of its library, or there is too little text.
    """
    seen: set[bytes] = set()
    modules = list(standard_library())
    sources = {
        "code": _new_documents((definition for module in modules for definition in module.definitions), seen),
        "prose": _new_prose([module.docstring for module in modules], seen),
    }
    counts = {}
    written: set[bytes] = set()
    for source, documents in sources.items():
        split: dict[str, list[str]] = {"train": [], "validation": []}
        for document in documents:
            content = _content_hash(document)
            if content not in written:
                # Two texts with their paragraphs cut in other places become the same here.
                written.add(content)
                split["train" if int.from_bytes(content) % _HELD_OUT else "validation"].append(document)
        for part, texts in split.items():
            name = f"{source}.{part}.jsonl"
            if not texts:
                raise ValueError(f"too little text for {name} in this Python installation; use a full Python")
            lines = "".join(json.dumps({"text": text, "source": source}) + "\n" for text in texts)
            write_atomically(folder / name, lines.encode())
            counts[name] = len(texts)
    write_atomically(folder / "corpus.json", json.dumps(counts, indent=1).encode())
    return counts


def _new_documents(documents: Iterator[str], seen: set[bytes]) -> Iterator[str]:
    """Documents whose content, below their heading line, has not been seen."""
    for document in documents:
        if _is_new(document.partition("\n")[2], seen):
            yield document


def _new_prose(docstrings: list[str], seen: set[bytes]) -> Iterator[str]:
    """Sections of all prose without the paragraphs that came before."""
    for text in (*docstrings, *prose_texts()):
        for section in sections(text):
            long = [paragraph for paragraph in section if len(_letters(paragraph)) >= _LONG_PARAGRAPH]
            repeated = {paragraph for paragraph in long if not _is_new(paragraph, seen)}
            if len(repeated) < len(set(long)):
                yield "\n\n".join(paragraph for paragraph in section if paragraph not in repeated) + "\n"


def _is_new(text: str, seen: set[bytes]) -> bool:
    content = _content_hash(text)
    if content in seen:
        return False
    seen.add(content)
    return True


def _letters(text: str) -> str:
    return _NO_LETTERS.sub("", text.lower())


def _content_hash(text: str) -> bytes:
    """Hash of the letters: years, versions, wrapping and case do not make another text."""
    return hashlib.sha256(_letters(text).encode()).digest()


def _training_texts(folder: Path) -> Iterator[str]:
    """Training documents of all sources, evenly thinned to what the tokenizer needs."""
    for source in SHARES:
        lines = (folder / f"{source}.train.jsonl").read_text("utf-8").splitlines()
        step = 1 + sum(map(len, lines)) * len(SHARES) // _TRAINING_CHARACTERS
        for line in lines[::step]:
            yield json.loads(line)["text"]
