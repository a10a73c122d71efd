"""SentencePiece models and Hugging Face folders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from megatron_m1.data.tokenizers import load_tokenizer, train_sentencepiece

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "  two  spaces\tand\ta tab\r\n\n\nend ",
    "naïve café 🙂 中文 \u2028 \u00a0 e\u0301 ﬁ",
    "</s> <unk> <0x41> 2024-01-31",
    "\x00\x01 control",
]


def sentencepiece_model(folder: Path, vocab_size: int = 330) -> Path:
    path = folder / "tokenizer.model"
    train_sentencepiece([text * 20 for text in TEXTS[:3]], path, vocab_size=vocab_size)
    return path


def hugging_face_folder(folder: Path, *, eos: str | None = "<|end|>") -> Path:
    """A byte-level tokenizer with 256 pieces and an end mark far above them."""
    alphabet = sorted(ByteLevel.alphabet())
    fast = FastTokenizer(BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    fast.pre_tokenizer = ByteLevel(add_prefix_space=False)
    fast.decoder = ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=eos).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("kind", ["sentencepiece", "hugging face"])
def test_text_survives(tmp_path: Path, kind: str) -> None:
    path = sentencepiece_model(tmp_path) if kind == "sentencepiece" else hugging_face_folder(tmp_path)
    tokenizer = load_tokenizer(path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eod not in ids, "an end mark that is spelled out is text"
    assert tokenizer.eod not in tokenizer.encode("spelled <|end|> out")
    assert 0 <= tokenizer.eod < tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["sentencepiece", "hugging face"])
def test_rows_of_an_embedding_that_are_no_ids(tmp_path: Path, kind: str) -> None:
    """A model may draw them as long as it is not trained."""
    path = sentencepiece_model(tmp_path) if kind == "sentencepiece" else hugging_face_folder(tmp_path)
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("x = 1")
    assert tokenizer.decode([tokenizer.vocab_size, *ids, 5000]) == "x = 1"


def test_sentencepiece_against_its_own_library(tmp_path: Path) -> None:
    path = sentencepiece_model(tmp_path)
    tokenizer, own = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.vocab_size == own.vocab_size() == 330
    assert tokenizer.eod == own.piece_to_id("</s>") == 1
    assert own.pad_id() == -1
    assert tokenizer.encode(TEXTS[0]) == own.encode(TEXTS[0])
    assert len(tokenizer.encode(TEXTS[0])) < 0.6 * len(TEXTS[0]), "it has learned something"


def test_training_is_reproducible_and_digests_tell_models_apart(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    a, b = sentencepiece_model(tmp_path / "a"), sentencepiece_model(tmp_path / "b")
    c = sentencepiece_model(tmp_path / "c", vocab_size=300)
    assert a.read_bytes() == b.read_bytes()
    digests = [load_tokenizer(path).digest() for path in (a, b, c)]
    assert digests[0] == digests[1] != digests[2]


def test_digest_of_a_folder(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path)
    before = load_tokenizer(folder).digest()
    (folder / "README.md").write_text("of no account")
    assert load_tokenizer(folder).digest() == before
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n")
    assert load_tokenizer(folder).digest() != before


def test_hugging_face_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(hugging_face_folder(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert len(tokenizer.encode("é" * 5000)) == 10_000


def test_wrong_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "vocab.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"vocab\.bin is no \.model file"):
        load_tokenizer(tmp_path / "vocab.bin")
    with pytest.raises(ValueError, match="holds no tokenizer files"):
        load_tokenizer(tmp_path)
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"bad\.model is no SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)


def test_no_end_mark(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no eos_token"):
        load_tokenizer(hugging_face_folder(tmp_path / "hf", eos=None))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "m"),
        vocab_size=300,
        byte_fallback=True,
        eos_id=-1,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="has no </s>"):
        load_tokenizer(tmp_path / "m.model")


def test_wrong_vocabulary_sizes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size is 100"):
        train_sentencepiece(TEXTS, tmp_path / "t.model", vocab_size=100)
    with pytest.raises(ValueError, match="cannot train 5000 pieces"):
        train_sentencepiece(TEXTS, tmp_path / "t.model", vocab_size=5000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["sentencepiece", "hugging face"])
def test_a_batch_has_the_ids_of_its_texts(tmp_path: Path, kind: str) -> None:
    path = sentencepiece_model(tmp_path) if kind == "sentencepiece" else hugging_face_folder(tmp_path)
    tokenizer = load_tokenizer(path)
    texts = [*TEXTS, "", " ", "spelled <|end|> out", "a" * 70_000]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode_batch([""]) == [[]]


def test_worker_processes_import_little(tmp_path: Path) -> None:
    """Each of torch, megatron-core and transformers costs a process seconds and hundreds of megabytes."""
    folder = hugging_face_folder(tmp_path)
    script = (
        "import sys; from megatron_m1.data.tokenizers import load_tokenizer;"
        f"load_tokenizer({str(folder)!r}).encode_batch(['a']); print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "tokenizers" in loaded and not loaded & {"torch", "megatron", "transformers", "pyarrow"}
