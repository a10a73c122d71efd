"""What SentencePiece is taught, and that its models give every string back."""

from __future__ import annotations

import importlib
import io
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatron_m1.convert.tokenizer import ready_tokenizer
from megatron_m1.data.tokenizers import load as tokenizers
from megatron_m1.data.tokenizers import load_tokenizer, train_sentencepiece
from megatron_m1.data.tokenizers.train import train_tokenizer
from tests.data.test_tokenizers import TEXTS

LINES = [*TEXTS[:3], "the quick  brown fox   jumps, 2024", "\tindented\tby tabs", "中文 測試 中文測試"] * 30
ANY_TEXT = st.text(st.characters(codec="utf-8")) | st.text(
    st.sampled_from("the quick  brown fox \u2581\u2581\u2585\u2047\n\t\r\0\ue000\ufeff\ufffd<0x41>/s🙂e\u0301中")
)


def words(choices: list[str], count: int) -> str:
    return " ".join(random.Random(count).choices(choices, k=count))


def normal_pieces(content: bytes) -> list[tuple[str, float]]:
    proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    return [(piece.piece.replace("\u2581", " "), piece.score) for piece in proto.ModelProto.FromString(content).pieces]


def as_before(lines: list[str], **options: Any) -> bytes:
    """A model straight from SentencePiece, as they were trained while U+2581 stood for spaces."""
    model = io.BytesIO()
    given_options = {"user_defined_symbols": ["\n"], "normalization_rule_name": "identity"} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
        **given_options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "t.model"
    train_sentencepiece(LINES, path, vocab_size=380)
    return path


def test_every_character_comes_back(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    for block in range(0, 0x110000, 256):
        if not 0xD800 <= block < 0xE000:
            text = "".join(f"a{chr(number)} b" for number in range(block, block + 256))
            assert tokenizer.decode(tokenizer.encode(text)) == text, hex(block)


def test_every_string_comes_back(model: Path, tmp_path: Path) -> None:
    """From the model, and from the Hugging Face tokenizer of an export, with equal ids."""
    tokenizer = load_tokenizer(model)
    ready_tokenizer(model, 380).write(tmp_path)
    exported, theirs = load_tokenizer(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True

    @settings(max_examples=1500, deadline=None)
    @given(ANY_TEXT)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert min(ids, default=2) >= 2, "neither unknown nor the end mark"
        assert exported.encode(text) == theirs.encode(text).ids == ids
        assert exported.decode(ids) == text

    check()


def test_models_trained_earlier_keep_their_ids(model: Path, tmp_path: Path) -> None:
    """Also with U+2581, which they give back as a space; the new model's differ in nothing else."""
    lines = [line for document in LINES for line in document.split("\n") if line]
    content = as_before(lines, vocab_size=380)
    (tmp_path / "t.model").write_bytes(content)
    assert normal_pieces(model.read_bytes()) == normal_pieces(content)
    own, old, new = (
        sentencepiece.SentencePieceProcessor(model_proto=content),
        load_tokenizer(tmp_path / "t.model"),
        load_tokenizer(model),
    )
    ready_tokenizer(tmp_path / "t.model", 380).write(tmp_path / "hf")
    exported = load_tokenizer(tmp_path / "hf")

    @settings(max_examples=500, deadline=None)
    @given(ANY_TEXT)
    def check(text: str) -> None:
        assert old.encode(text) == own.encode(text) == exported.encode(text)
        assert old.decode(old.encode(text)) == text.replace("\u2581", " ")
        if "\u2581" not in text:
            assert new.encode(text) == own.encode(text)

    check()


@pytest.mark.parametrize("mark", ["\u2585", "\u2581", "\0", "\r", "\t", "\ue000", "\ufffe", "</s>", "<unk>"])
def test_no_line_is_left_out_for_what_is_in_it(tmp_path: Path, mark: str) -> None:
    train_sentencepiece([f"zulu yankee{mark}whiskey zulu"] * 50, tmp_path / "t.model", vocab_size=285)
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert len(tokenizer.encode("zulu")) == 1
    assert len(tokenizer.encode("zulu yankee whiskey")) < 8


@pytest.mark.parametrize("count", [1, 40])
def test_long_lines_teach_as_much_as_short_ones(tmp_path: Path, count: int) -> None:
    """The reference trains on whole lines, which SentencePiece takes once its limit is raised."""
    lines = [words(["zulu", "yankee", "  whiskey ", "é中"], 1500 + i) for i in range(count)]
    train_sentencepiece(lines, tmp_path / "t.model", vocab_size=300)
    reference = as_before(lines, vocab_size=300, max_sentence_length=1 << 24)
    assert normal_pieces((tmp_path / "t.model").read_bytes()) == normal_pieces(reference)
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert len(lines[0]) / len(tokenizer.encode(lines[0])) > 3


@pytest.mark.parametrize(
    "text", ["é" * 100_000, " " * 100_000, words(["a", "bc", " "], 50_000), "🙂" * 5000 + " x", "x" * 4193, ""]
)
def test_parts_of_a_long_line_are_the_line(text: str) -> None:
    parts = list(tokenizers._training_lines(text))
    assert "".join(parts) == text
    assert all(0 < len(part.encode()) <= 4192 for part in parts)


def test_few_large_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thinned, they are still more than none."""
    monkeypatch.setattr("megatron_m1.data.tokenizers.train.TRAINING_BYTES", 1000)
    (tmp_path / "a.txt").write_text(words(["zulu", "yankee"], 3000))
    train_tokenizer([tmp_path / "a.txt"], tmp_path / "t.model", vocab_size=280)
    assert len(load_tokenizer(tmp_path / "t.model").encode("zulu yankee")) <= 3


def test_which_way_the_vocabulary_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot train 300 pieces on these texts; take a larger vocab_size"):
        train_sentencepiece(["".join(map(chr, range(0x4E00, 0x5E00)))] * 3, tmp_path / "t.model", vocab_size=300)
    with pytest.raises(ValueError, match="take a smaller vocab_size or more text"):
        train_sentencepiece([], tmp_path / "t.model", vocab_size=300)
