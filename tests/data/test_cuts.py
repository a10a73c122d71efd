"""Texts cut where a tokenizer's rule allows it have the ids of the whole; unknown tokenizers have no rule."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from megatron_m1.data.tokenizers import train_sentencepiece
from megatron_m1.data.tokenizers.cuts import LineCut
from megatron_m1.data.tokenizers.token_ids import FastIds, SentencePieceIds

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECES = [
    *(")\n", "a", "a\n", "the\n"),
    *("a", "Bc", "the", "THE", " ", "  ", "\n", "\n\n", "\r\n", "\t", "1", "2024", "'s", "'", "don't", ")", "/", "//"),
    *("!", " (", "<x>", "é", "e\u0301", "\u0301", "中", "ñ", "ǅ", "٣", "🙂", "\u2028", "\u00a0", "_", "\u2581", "\x0b"),
]


def texts(count: int = 60) -> list[str]:
    draw = random.Random(0)
    many = ["".join(draw.choices(PIECES, k=120)) for _ in range(count)]
    code = ["def f(x):\n    return x\n\nclass A:\n    b = 1\nprint(f(2))\n3\n4)\nx\n"]
    return many + code


def byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str, behavior: str = "isolated", *, invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


def hugging_face(stages: Sequence[Any], normalizer: Any = None, added: Sequence[AddedToken] = ()) -> Tokenizer:
    """A BPE tokenizer that has learnt all it can of the texts, across whatever its words hold."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(stages))
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def check_all_places(encode: Callable[[str], list[int]], cut: LineCut) -> int:
    """Cut every text at every place one by one, and at all places together; returns the number of places."""
    total = 0
    for text in texts():
        content, whole = text.encode(), encode(text)
        places, end = [], len(content)
        while (at := cut.last(content[:end])) > 0:
            places.append(at)
            # The rule looks at one byte behind the place.
            end = at
            assert encode(content[:at].decode()) + encode(content[at:].decode()) == whole, (text, at)
        parts = zip([0, *reversed(places)], [*reversed(places), len(content)], strict=True)
        assert [number for start, stop in parts for number in encode(content[start:stop].decode())] == whole
        total += len(places)
    return total


KNOWN = {
    "gpt2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama 3": [split(LLAMA), byte_level()],
    "qwen": [split(QWEN), byte_level()],
    "gpt-4o": [split(O200K), byte_level()],
    "tiktoken": [split(LLAMA, "removed", invert=True), byte_level()],
    "deepseek": [
        split(r"\p{N}{1,3}"),
        split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
        split(DEEPSEEK),
        byte_level(),
    ],
    "starcoder": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
}


@pytest.mark.parametrize("name", KNOWN)
def test_every_place_of_known_pre_tokenizers(name: str) -> None:
    ids = FastIds(hugging_face(KNOWN[name]))
    assert ids.line_cut is not None
    assert check_all_places(ids.encode, ids.line_cut) > 30


@pytest.mark.parametrize("form", [normalizers.NFC(), normalizers.NFD(), normalizers.NFKC(), normalizers.NFKD()])
def test_normalizers_that_work_character_by_character(form: Any) -> None:
    ids = FastIds(hugging_face(KNOWN["qwen"], form))
    assert ids.line_cut is not None
    assert check_all_places(ids.encode, ids.line_cut) > 30


def test_added_tokens() -> None:
    harmless = [AddedToken("<x>", lstrip=True, rstrip=True), AddedToken("the"), AddedToken("Bc", rstrip=True)]
    ids = FastIds(hugging_face(KNOWN["llama 3"], added=harmless))
    assert ids.line_cut is not None
    assert check_all_places(ids.encode, ids.line_cut) > 30
    for token in (AddedToken("a\nb"), AddedToken("the", lstrip=True), AddedToken("the", single_word=True)):
        assert FastIds(hugging_face(KNOWN["llama 3"], added=[token])).line_cut is None


def test_other_places_do_change_ids() -> None:
    """What the rule leaves out matters: the test above can fail."""
    encode = FastIds(hugging_face(KNOWN["gpt2"])).encode
    assert encode("a \n") + encode("the") != encode("a \nthe")
    assert encode("a\n\n") + encode("the") != encode("a\n\nthe")
    with pytest.raises(AssertionError):
        check_all_places(encode, LineCut(before=None, after=None))


@pytest.mark.parametrize(
    "stages",
    [
        [pre_tokenizers.Metaspace()],
        [pre_tokenizers.ByteLevel(add_prefix_space=True)],
        [split(LLAMA + r"|\n+\p{L}"), byte_level()],
        [split(r"\s+(?=\p{L})"), byte_level()],
        [split(LLAMA, "merged_with_next"), byte_level()],
        [byte_level(), split(LLAMA)],
        [byte_level()],
    ],
)
def test_unknown_pre_tokenizers_have_no_rule(stages: list[Any]) -> None:
    assert FastIds(hugging_face(stages)).line_cut is None


@pytest.mark.parametrize(
    "normalizer",
    [normalizers.Strip(), normalizers.Prepend("_"), normalizers.Replace("\na", "b"), normalizers.Lowercase()],
)
def test_unknown_normalizers_have_no_rule(normalizer: Any) -> None:
    together = normalizers.Sequence([normalizers.NFC(), normalizer])
    assert FastIds(hugging_face(KNOWN["llama 3"], together)).line_cut is None


def sentencepiece_model(**options: Any) -> SentencePieceIds:
    model = io.BytesIO()
    lines = [line for text in texts() for line in text.split("\n") if line.strip()]
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
    }
    settings |= {"remove_extra_whitespaces": False, "add_dummy_prefix": False, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **(settings | options)
    )
    return SentencePieceIds(model.getvalue())


def test_models_of_our_training_are_cut_at_every_line_break(tmp_path: Path) -> None:
    train_sentencepiece(texts(), tmp_path / "a.model", vocab_size=600)
    ids = SentencePieceIds((tmp_path / "a.model").read_bytes())
    assert ids.line_cut == LineCut(before=None, after=None)
    assert check_all_places(ids.encode, ids.line_cut) > 300


@pytest.mark.parametrize("symbols", [[], ["\n"], ["\nthe", "a\n"]])
def test_other_models_of_kind_bpe(symbols: list[str]) -> None:
    ids = sentencepiece_model(user_defined_symbols=symbols)
    assert ids.line_cut is not None
    assert check_all_places(ids.encode, ids.line_cut) > 30
    if "\nthe" in symbols:
        assert ids.line_cut.after is not None
        assert ord("t") not in ids.line_cut.after


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"byte_fallback": False},
    ],
)
def test_models_without_a_rule(options: dict[str, Any]) -> None:
    assert sentencepiece_model(**options).line_cut is None
