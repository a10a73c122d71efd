"""Where a text may be cut so that its parts, encoded by themselves, give the ids of the whole.

A rule here is a proof about a tokenizer's parts, not an observation: a tokenizer with a part that is not known gets
none, and its documents are encoded whole. All rules cut after a line break, between ASCII characters.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

_LETTERS, _DIGITS = frozenset(string.ascii_letters.encode()), frozenset(string.digits.encode())
_VISIBLE = frozenset(range(0x21, 0x7F))
_UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}


@dataclass(frozen=True)
class LineCut:
    """Cut after a line break that stands between bytes of two sets."""

    before: frozenset[int] | None
    """Bytes before the line break; None for any, and for none at all."""
    after: frozenset[int] | None
    """Bytes after it; None for any byte."""

    def last(self, text: bytes | bytearray, start: int = 0) -> int:
        """Index of the last place to cut UTF-8 ``text``, its line break at ``start`` or later; -1 if there is none."""
        end = len(text) - 1
        while (at := text.rfind(b"\n", start, end)) >= 0:
            if (self.before is None or (at and text[at - 1] in self.before)) and (
                self.after is None or text[at + 1] in self.after
            ):
                return at + 1
            end = at
        return -1


# --- SentencePiece


def sentencepiece_cut(model: Any) -> LineCut | None:
    """The rule of a SentencePiece ``ModelProto``; None if it has none.

    BPE merges neighbours whose concatenation is a piece. A line break whose follower is in no piece directly after a
    line break is therefore never merged with it, nor do merges on its two sides know of each other, as long as what
    stands at the start of a text is treated as what stands elsewhere. Unigram models add scores up over the whole
    text, in 32 bits: there a cut can change the rounding.
    """
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    looks_around = normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
    if trainer.model_type != trainer.BPE or normalizer.precompiled_charsmap or looks_around:
        return None
    pieces = [piece.piece for piece in model.pieces]
    # Neighbours that are both unknown become one id.
    if "\n" not in pieces and not trainer.byte_fallback:
        return None
    followers = {piece[at + 1] for piece in pieces for at in _all(piece, "\n") if at + 1 < len(piece)}
    if not followers:
        return LineCut(before=None, after=None)
    return LineCut(before=None, after=(_LETTERS | _DIGITS) - {ord(character) for character in followers})


def _all(text: str, character: str) -> Iterator[int]:
    return (at for at, found in enumerate(text) if found == character)


# --- Hugging Face's tokenizers library

# Alternatives of pre-tokenizing patterns. Of each: in a text with visible ASCII, one line break, then an ASCII letter
# or digit, (1) no match holds the line break and what follows it; (2) every match that begins up to the line break is
# the one that would be found if the text ended with it. Alternatives are tried one by one, so this holds for any order
# of them, and a text that is cut there falls into the same pieces.
_OTHERS = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "(?i:'s|'t|'re|'ve|'m|'ll|'d)"),
    r" ?[^\s\p{L}\p{N}]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r" ?[\p{P}\p{S}]+[\r\n]*",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"\s*[\r\n]+",
    r"\s*[\r\n]",
    r"\s+",
}
_OF_LETTERS = {
    r" ?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
}
"""These begin a match at any ASCII letter, wherever the one before ended."""
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIXES = ("", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?")
_OF_SMALL_LETTERS = {rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{suffix}" for suffix in _SUFFIXES}
_OF_CAPITALS = {rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{suffix}" for suffix in _SUFFIXES}
_OF_DIGITS = {r" ?\p{N}+", r"\p{N}{1,3}", r"\p{N}"}
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TRAILING_SPACE = r"|\s+(?!\S)|\s+"
"""Together they match one line break, whatever follows; the first alone does not."""


def hugging_face_cut(
    normalizer: Mapping[str, Any] | None,
    pre_tokenizer: Mapping[str, Any] | None,
    added_tokens: Iterable[AddedToken],
) -> LineCut | None:
    """The rule of a tokenizer of the ``tokenizers`` library, from the parts of its ``tokenizer.json``; None if none.

    A place where the pre-tokenizer begins a new word in any case, and sees on either side what it would see without
    the other, is a place to cut, for models work word by word. It needs a normalizer that works character by character
    there, and added tokens that do not reach across.
    """
    if not _normalizes_locally(normalizer) or any(map(_reaches_across, added_tokens)) or pre_tokenizer is None:
        return None
    stages = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    # Behind ByteLevel a line break is spelled as a letter, of which nothing here holds.
    if any(stage["type"] == "ByteLevel" for stage in stages[:-1]):
        return None
    beginnings: frozenset[int] = frozenset()
    for stage in stages:
        found = _beginnings(stage)
        if found is None:
            return None
        beginnings |= found
    return LineCut(before=_VISIBLE, after=beginnings) if beginnings else None


def _normalizes_locally(normalizer: Mapping[str, Any] | None) -> bool:
    if normalizer is None:
        return True
    if normalizer["type"] == "Sequence":
        return all(map(_normalizes_locally, normalizer["normalizers"]))
    # A line break and what is ASCII combine with nothing before them.
    return normalizer["type"] in _UNICODE_FORMS


def _reaches_across(token: AddedToken) -> bool:
    content = token.content
    looks_back = token.lstrip or token.single_word
    return "\n" in content or (looks_back and content[:1].isalnum())


def _beginnings(stage: Mapping[str, Any]) -> frozenset[int] | None:
    """Bytes at which a stage begins a word when they follow a line break; None if it is not known to keep our rules."""
    if stage["type"] == "Digits":
        return _DIGITS
    if stage["type"] == "ByteLevel":
        if stage["add_prefix_space"]:
            return None
        return _of_pattern(_GPT2) if stage.get("use_regex", True) else frozenset()
    if stage["type"] != "Split" or "Regex" not in stage["pattern"]:
        return None
    # Where all is matched, to keep the words that match is the same as to split at them.
    if (stage["behavior"], stage["invert"]) not in (("Isolated", False), ("Removed", True)):
        return None
    return _of_pattern(stage["pattern"]["Regex"])


def _of_pattern(pattern: str) -> frozenset[int] | None:
    # Some files hold the characters themselves.
    pattern = pattern.replace("\r", r"\r").replace("\n", r"\n")
    alternatives = set(_alternatives(pattern.removesuffix(_TRAILING_SPACE)))
    known = _OTHERS | _OF_LETTERS | _OF_SMALL_LETTERS | _OF_CAPITALS | _OF_DIGITS
    if not alternatives <= known:
        return None
    has_both_cases = alternatives & _OF_SMALL_LETTERS and alternatives & _OF_CAPITALS
    letters = _LETTERS if alternatives & _OF_LETTERS or has_both_cases else frozenset()
    return letters | (_DIGITS if alternatives & _OF_DIGITS else frozenset())


def _alternatives(pattern: str) -> Iterator[str]:
    """Split a pattern at the bars outside parentheses and classes."""
    depth, in_class, start, position = 0, False, 0, 0
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 1
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character == "|" and not depth:
            yield pattern[start:position]
            start = position + 1
        position += 1
    yield pattern[start:]
