"""Tokenizers of Hugging Face folders: a SentencePiece model becomes one with equal ids, a folder's files are copied."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_m1.checkpoint import folder
from megatron_m1.convert.licences import PATTERNS
from megatron_m1.convert.places import CONFIG
from megatron_m1.data.tokenizers import load_tokenizer
from megatron_m1.data.tokenizers.hf_folder import FOLDER_FILES, GENERATION, OTHER_VOCABULARIES, read_folder
from megatron_m1.files import read_json_object, regular

SPACE = "\u2581"
"""SentencePiece's space, in models that escape spaces."""
TOKENIZER = folder.TOKENIZER
"""Folder of an imported model in which its tokenizer is, beside ``checkpoints``."""
FILES = (
    "tokenizer*",
    "tokenization*.py",
    "vocab*",
    "merges*",
    *FOLDER_FILES,
    *OTHER_VOCABULARIES,
    "*.tiktoken",
    "normalizer.json",
    "chat_template*",
    "chat_templates/*",
    "additional_chat_templates/*",
    GENERATION,
    *PATTERNS,
)
"""Patterns of what belongs to a tokenizer in a Hugging Face folder. Its code is copied, and never run."""
_READ = (CONFIG, "*.safetensors", "*.safetensors.index.json")
"""Patterns of what an import reads."""
ENLARGE = "megatron-m1 convert from-hf HF_FOLDER OUT --resize-vocab"
"""What gives a model more rows; their number follows."""
_BPE = 2
_NORMAL, _USER_DEFINED = 1, 4


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy a Hugging Face folder's tokenizer, byte by byte; config.json with it where only that names what ends a text.

    Returns:
        Whether there is one.
    """
    if not has_tokenizer(source):
        return False
    for file in _matching(source, FILES if ends_of_config(source) is None else (*FILES, CONFIG)):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)
    return True


def has_tokenizer(folder: Path) -> bool:
    """Whether a Hugging Face folder has files of a tokenizer."""
    return any((folder / name).is_file() for name in (*FOLDER_FILES, *OTHER_VOCABULARIES))


def ends_of_config(source: Path) -> int | list[Any] | None:
    """``eos_token_id`` of config.json where nothing else in the folder of a tokenizer says as much; None if it does."""
    if (source / GENERATION).is_file():
        return None
    try:
        ends = read_json_object(source / CONFIG).get("eos_token_id")
    except (OSError, ValueError):
        return None  # a tokenizer's folder needs none
    # One that the tokenizer names is better known there: transformers' own defaults stand in many a config.json.
    single = type(ends) is int and read_folder(source).end_mark is None
    return ends if single or isinstance(ends, list) else None


def check_rows(tokens: int, rows: int, tokenizer: Path | str) -> None:
    """Check that the embedding has a row for every id of a tokenizer.

    Raises:
        ValueError: it has not; one line with what makes a larger one.
    """
    if tokens > rows:
        raise ValueError(
            f"tokenizer {tokenizer} has {tokens} tokens, the model's embedding {rows} rows: give another tokenizer, or "
            f"make rows for it with {ENLARGE} {tokens}"
        )


def token_count(folder: Path) -> int | None:
    """How many ids the tokenizer of a Hugging Face folder has; None if it has none, or none that can be loaded here."""
    try:
        return load_tokenizer(folder).vocab_size if has_tokenizer(folder) else None
    except (OSError, ValueError):
        return None


def left_behind(source: Path) -> list[str]:
    """A line, or none, that names the files of a Hugging Face folder that an import leaves there."""
    kept = FILES if has_tokenizer(source) else PATTERNS
    taken = {*_matching(source, kept), *_matching(source, _READ)}
    left = [str(file) for file in _matching(source, ("*",)) if file not in taken and not file.name.startswith(".")]
    if not left:
        return []
    code = "; to-hf takes the model's code with --remote-code" if any(name.endswith(".py") for name in left) else ""
    return [f"left in {source}, and not exported again: {', '.join(left)}{code}"]


def _matching(source: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({file.relative_to(source) for name in patterns for file in source.glob(name) if file.is_file()})


@dataclass(frozen=True)
class ReadyTokenizer:
    """A tokenizer that can be put into a folder. Make one with ``ready_tokenizer``."""

    source: Path
    eos_token_id: int
    converted: Any
    """transformers' tokenizer; None where the source's files are copied."""
    vocab_size: int
    """Its ids are below it."""
    notes: tuple[str, ...]
    """What was assumed of it, one line each."""

    @property
    def description(self) -> str:
        """Its kind and its size, in words."""
        kind = "a Hugging Face folder's" if self.converted is None else "a SentencePiece BPE model, converted"
        return f"{kind}, {self.vocab_size:,} ids, {self.eos_token_id} ends documents"

    def write(self, folder: Path) -> dict[str, Any]:
        """Put it into a Hugging Face folder; returns the ids that config.json and generation_config.json name.

        Several ends of the config.json that it came with stay several.

        Raises:
            OSError: the disk refuses.
        """
        ids: dict[str, Any] = {"eos_token_id": self.eos_token_id}
        if self.converted is None:
            copy_tokenizer(self.source, folder)
            ends = ends_of_config(self.source)
            if isinstance(ends, list) and self.eos_token_id in ends:
                ids["eos_token_id"] = ends
        else:
            try:
                self.converted.save_pretrained(str(folder))
            except Exception as error:
                if type(error) is not Exception:
                    raise
                # What tokenizers, which is no Python, raises for a disk that refuses.
                raise OSError(f"{folder / FOLDER_FILES[0]}: {error}") from error
            ids["bos_token_id"] = self.converted.bos_token_id
        return ids


def ready_tokenizer(path: Path, vocab_size: int) -> ReadyTokenizer:
    """Load, and if need be convert, a tokenizer for a Hugging Face folder.

    Args:
        path: SentencePiece ``.model`` or Hugging Face tokenizer folder, whose special tokens and chat template are
            kept.
        vocab_size: rows of the model's embedding.

    Raises:
        ValueError: it or its settings for generation can't be read, it is larger than the embedding, or a SentencePiece
            model of a kind that has no exact counterpart.
    """
    try:
        loaded = load_tokenizer(path)
    except OSError as error:
        raise ValueError(f"tokenizer {path} can't be read: {error.strerror or error}") from error
    if (path / GENERATION).is_file():
        # It is read again when it is copied, at the end: a fault in it is told before hours of work on weights.
        read_json_object(path / GENERATION)
    check_rows(loaded.vocab_size, vocab_size, path)
    converted = None if path.is_dir() else from_sentencepiece(path)
    return ReadyTokenizer(path, loaded.eod, converted, loaded.vocab_size, loaded.notes)


def from_sentencepiece(path: Path) -> Any:
    """Make a transformers tokenizer of a SentencePiece BPE model with byte fallback.

    SentencePiece joins the neighbours whose joint piece has the best score; Hugging Face's BPE follows a list of pairs.
    All pairs that make some piece, in the order of the pieces' scores, are that list.

    Raises:
        ValueError: the model's kind has no exact counterpart.
    """
    proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    model = proto.ModelProto.FromString(regular(path).read_bytes())
    _check(model, path)
    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    unknown = model.pieces[model.trainer_spec.unk_id].piece
    tokenizer = Tokenizer(
        BPE(vocabulary, _merges(model, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefixed, escaped = model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.escape_whitespaces
    steps = [normalizers.Prepend(" ")] if prefixed else []
    ends = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, *([normalizers.Replace(" ", SPACE)] if escaped else [])])
    spaces = [decoders.Replace(SPACE, " ")] if escaped else []
    tokenizer.decoder = decoders.Sequence([*spaces, decoders.ByteFallback(), decoders.Fuse(), *ends])
    tokenizer.add_tokens([AddedToken(symbol, normalized=False) for symbol in _longer_symbols(model)])
    marks = {
        name: model.pieces[index].piece
        for name, index in (
            ("bos_token", model.trainer_spec.bos_id),
            ("eos_token", model.trainer_spec.eos_id),
            ("pad_token", model.trainer_spec.pad_id),
        )
        if index >= 0
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        **marks,
    )


def _longer_symbols(model: Any) -> list[str]:
    """User-defined symbols of several characters: Hugging Face cuts texts at these before it does anything else."""
    return [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED and len(piece.piece) > 1]


def _check(model: Any, path: Path) -> None:
    trainer, normalizer, symbols = model.trainer_spec, model.normalizer_spec, _longer_symbols(model)
    faults = [
        (trainer.model_type != _BPE, "it is no BPE model"),
        (not trainer.byte_fallback, "it has no byte fallback"),
        (bool(normalizer.precompiled_charsmap), f"it normalises text ({normalizer.name})"),
        (normalizer.remove_extra_whitespaces, "it removes spaces"),
        (trainer.treat_whitespace_as_suffix, "it treats spaces as suffixes"),
        (normalizer.add_dummy_prefix and bool(symbols), f"it puts a space before texts, and has symbols: {symbols}"),
        (any({" ", SPACE} & set(symbol) for symbol in symbols), f"it has symbols with spaces: {symbols}"),
    ]
    for is_fault, reason in faults:
        if is_fault:
            raise ValueError(f"tokenizer {path} has no exact Hugging Face counterpart: {reason}")


def _merges(model: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    normal = {piece.piece for piece in model.pieces if piece.type == _NORMAL}
    merges = []
    for piece in sorted((p for p in model.pieces if p.type == _NORMAL), key=lambda p: -p.score):
        text = piece.piece
        pairs = [(text[:at], text[at:]) for at in range(1, len(text))]
        known = [(left, right) for left, right in pairs if left in normal and right in normal]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges
