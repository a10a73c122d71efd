"""What the files of a Hugging Face tokenizer folder say, read without running or importing anything of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from megatron_m1.files import check_folder

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"
FOLDER_FILES = (
    FILE,
    CONFIG,
    "tokenizer.model",
    SPECIAL,
    ADDED,
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Files of a Hugging Face folder that decide how text is cut; its others (weights, cards) do not matter."""
OTHER_VOCABULARIES = (
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "tekken.json",
    "tiktoken.model",
    "bpe.codes",
    "dict.txt",
    "encoder.json",
    "vocab.bpe",
    "vocab.tsv",
    "prophetnet.tokenizer",
    "emoji.json",
)
"""Vocabularies of particular classes of transformers; they matter where there is no ``tokenizer.json``."""
GENERATION = "generation_config.json"
"""May give the end mark's id where nothing names its text; config.json where this does not."""

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_KEPT_CLASSES = ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "PythonBackend")
"""Of transformers 5, those that take ``tokenizer.json`` as it is."""
_KEPT_TYPES = (None, "", "minimax", "minimax_m1", "minimax_m2")
"""Values of config.json's ``model_type`` for which it takes one of these where no class is named."""
_REBUILT_TYPES = (
    "qwen2",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen4_exp",
    "siglip2",
    "hyperclovax_vision_v2",
)
"""Values for which it takes another class than the folder names."""


@dataclass(frozen=True)
class TokenizerFolder:
    """The tokenizer files of a folder. Make one with ``read_folder``."""

    path: Path
    contents: dict[str, bytes]
    """Content of its files among ``FOLDER_FILES`` and ``OTHER_VOCABULARIES``, by name."""
    config: dict[str, Any]
    """``tokenizer_config.json``."""
    special: dict[str, Any]
    """``special_tokens_map.json``."""
    end_mark: str | None
    """Text of the token that ends documents."""
    end_mark_in: str
    """The file that names it."""
    end_id: int | None
    """Its id, where no file names its text and one gives the id."""
    rebuilt_class: str | None
    """The class for which transformers 5 does not take ``tokenizer.json`` as it is, or may not; None if it does."""
    names_class: bool
    """Whether one of its files names a class or a kind of model, by which transformers takes a class."""
    own_code: str | None
    """The class that the folder brings as Python code for its tokenizer."""
    notes: list[str] = field(default_factory=list)

    @property
    def declared_in(self) -> str:
        """The file that lists added tokens beside ``tokenizer.json``."""
        return CONFIG if "added_tokens_decoder" in self.config else ADDED

    def declared_tokens(self) -> Iterator[tuple[AddedToken, int]]:
        """Yield added tokens of the files beside ``tokenizer.json`` with their ids, in the order of these.

        Raises:
            ValueError: the list can't be read.
        """
        try:
            yield from sorted(self._declared(), key=lambda pair: pair[1])
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise ValueError(f"{self.path / self.declared_in}: its added tokens can't be read: {error}") from error

    def _declared(self) -> list[tuple[AddedToken, int]]:
        if self.declared_in == CONFIG:
            named = {mark.content for mark in self.marks()}
            return [
                (_added_token(token, special=token.get("special", False) or token["content"] in named), int(number))
                for number, token in self.config["added_tokens_decoder"].items()
            ]
        added = json_object(self.path / ADDED, self.contents.get(ADDED))
        special = {mark.content for mark in (*self.marks(), *self.extra_marks())}
        return [
            (AddedToken(text, normalized=text not in special, special=text in special), int(number))
            for text, number in added.items()
        ]

    def marks(self) -> list[AddedToken]:
        """Special tokens that have a name, such as ``bos_token``."""
        return [_added_token(token, special=True) for token in self._named_marks().values()]

    def mark_texts(self) -> dict[str, str]:
        """Texts of these tokens by name, as chat templates get them."""
        return {name: str(token_text(token)) for name, token in self._named_marks().items()}

    def _named_marks(self) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for source in self._sources():
            for key in (*_NAMED, *(key for key in source if key.endswith("_token") and key not in _NAMED)):
                if token_text(source.get(key)) is not None:
                    named.setdefault(key, source[key])
        return named

    def extra_marks(self) -> list[AddedToken]:
        """Special tokens without a name."""
        extra = []
        for source in self._sources():
            for key in ("additional_special_tokens", "extra_special_tokens"):
                given = source.get(key) or []
                tokens = given.values() if isinstance(given, dict) else given if isinstance(given, list) else []
                extra += [_added_token(token, special=True) for token in tokens if token_text(token) is not None]
        return extra

    def _sources(self) -> list[dict[str, Any]]:
        """What names special tokens; as in transformers, ``added_tokens_decoder`` makes the older file superfluous."""
        return [self.config] if "added_tokens_decoder" in self.config else [self.config, self.special]

    def vocabulary_files(self) -> list[str]:
        """Names of the files, ``tokenizer.json`` apart, that hold a vocabulary."""
        return [name for name in self.contents if name not in (FILE, CONFIG, SPECIAL, ADDED)]

    def digested(self) -> dict[str, bytes]:
        """The files that decide a text's ids, in a constant order."""
        whole = FILE in self.contents
        names = FOLDER_FILES if whole else (*FOLDER_FILES, *OTHER_VOCABULARIES)
        files = {name: self.contents[name] for name in names if name in self.contents}
        if whole and self.end_mark is None:
            files["end id"] = str(self.end_id).encode()
        return files


def read_folder(path: Path) -> TokenizerFolder:
    """Read the tokenizer files of a folder.

    Raises:
        OSError: one can't be read.
        ValueError: there is none, one is no JSON object, or the folder has something that is no file; one line.
    """
    check_folder(path)
    names = (*FOLDER_FILES, *OTHER_VOCABULARIES)
    contents = {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
    if not contents:
        raise ValueError(f"{path} holds no tokenizer files; give a folder with tokenizer.json or its like")
    config = json_object(path / CONFIG, contents.get(CONFIG))
    special = json_object(path / SPECIAL, contents.get(SPECIAL))
    model, generation = (_optional(path / name) for name in ("config.json", GENERATION))
    end_mark, end_mark_in = token_text(config.get("eos_token")), CONFIG
    if end_mark is None:
        end_mark, end_mark_in = token_text(special.get("eos_token")), SPECIAL
    end_id = None
    if end_mark is None:
        # As in transformers, config.json is asked where there are no settings for generation that say.
        end_id = _end_id(generation if generation.get("eos_token_id") is not None else model)
    kind = _rebuilt_class(config, model, contents.get(FILE, b""))
    code = _own_code(config)
    named = bool(config.get("tokenizer_class") or model.get("tokenizer_class"))
    named = named or model.get("model_type") not in list(_KEPT_TYPES)
    folder = TokenizerFolder(path, contents, config, special, end_mark, end_mark_in, end_id, kind, named, code)
    if FILE in contents:
        folder.notes.extend(_notes(folder))
    return folder


def _optional(path: Path) -> dict[str, Any]:
    return json_object(path, path.read_bytes() if path.is_file() else None)


def token_text(token: object) -> str | None:
    """Text of a token that is given as a string or as an object with ``content``; None where there is none."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def json_object(path: Path, content: bytes | None) -> dict[str, Any]:
    """Parse a JSON object; an absent file counts as an empty one.

    Raises:
        ValueError: it is none; one line with the file's name.
    """
    if content is None:
        return {}
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object")
    return value


def _added_token(token: str | dict[str, Any], *, special: bool) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=special)
    flags = {name: bool(token[name]) for name in _FLAGS if name in token}
    return AddedToken(token["content"], **(flags | {"special": special}))


def _end_id(settings: dict[str, Any]) -> int | None:
    """``eos_token_id`` if it is one; of several, none is known to end documents."""
    end = settings.get("eos_token_id")
    if isinstance(end, list) and len(end) == 1:
        end = end[0]
    return end if isinstance(end, int) and not isinstance(end, bool) and 0 <= end < 1 << 31 else None


def _own_code(config: dict[str, Any]) -> str | None:
    code = config.get("auto_map")
    if isinstance(code, dict):
        code = code.get("AutoTokenizer")
    if isinstance(code, list):
        code = next((name for name in reversed(code) if name), None)
    return None if code is None else str(code)


def _rebuilt_class(config: dict[str, Any], model: dict[str, Any], content: bytes) -> str | None:
    kind = config.get("tokenizer_class") or model.get("tokenizer_class")
    model_type = model.get("model_type")
    if _own_code(config) is not None or model_type in list(_REBUILT_TYPES):
        return str(kind or _own_code(config) or model_type)
    if kind is None:
        return None if model_type in list(_KEPT_TYPES) else str(model_type)
    byte_level_llama = kind in ("LlamaTokenizer", "LlamaTokenizerFast") and b'"ByteLevel"' in content
    return None if kind in _KEPT_CLASSES or byte_level_llama else str(kind)


def _notes(folder: TokenizerFolder) -> Iterator[str]:
    if folder.own_code is not None:
        yield f"{folder.path}: its own code ({folder.own_code}) is not run; the ids are those of {FILE}"
    elif folder.rebuilt_class is not None:
        yield (
            f"{folder.path}: the ids are those of {FILE}; where transformers 5 builds {folder.rebuilt_class} anew from"
            " its vocabulary, it may give others"
        )
    if folder.config.get("fast_tokenizer_files"):
        yield f"{folder.path}: of the files for several versions of transformers, {FILE} is taken"
    if folder.end_mark is None and folder.end_id is not None:
        yield f"{folder.path} names no eos_token: documents end with its eos_token_id, {folder.end_id}"
    ends = {
        name: token_text(source.get("eos_token"))
        for name, source in ((CONFIG, folder.config), (SPECIAL, folder.special))
    }
    if ends[CONFIG] is not None and ends[SPECIAL] not in (None, ends[CONFIG]):
        yield f"{folder.path}: eos_token is {ends[CONFIG]!r}, as {CONFIG} says; {SPECIAL} says {ends[SPECIAL]!r}"


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return next((line for line in str(error).splitlines() if line.strip()), repr(error))
