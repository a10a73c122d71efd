"""Tokenizers of exported folders: equal ids on real text, and nothing lost of imported ones."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_m1.cli import run
from megatron_m1.convert.tokenizer import copy_tokenizer, left_behind, ready_tokenizer
from megatron_m1.data.demo.corpus import build_corpus
from megatron_m1.data.tokenizers import load_tokenizer, train_sentencepiece
from tests.checkpoint.checkpoint_runs import file_size_limit
from tests.convert.folders import convert
from tests.data.test_tokenizers import TEXTS, hugging_face_folder
from tests.reference.transformers_minimax import build

CHARACTERS = 1_000_000
"""Of the corpus's held-out text, which the tokenizer has not seen."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    build_corpus(folder)
    return folder


def texts_of(file: Path) -> list[str]:
    texts, taken = [], 0
    for line in file.read_text("utf-8").splitlines():
        if taken < CHARACTERS:
            texts.append(json.loads(line)["text"])
            taken += len(texts[-1])
    return texts


def test_equal_ids_on_the_corpus(corpus: Path, tmp_path: Path) -> None:
    """Code and prose, and texts full of traps; encoded, and decoded again."""
    model = tmp_path / "tokenizer.model"
    training = texts_of(corpus / "code.train.jsonl") + texts_of(corpus / "prose.train.jsonl")
    train_sentencepiece(training, model, vocab_size=4096)
    ready_tokenizer(model, 4096).write(tmp_path / "hf")
    ours, theirs = load_tokenizer(model), AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = texts_of(corpus / "code.validation.jsonl") + texts_of(corpus / "prose.validation.jsonl")
    texts += [*TEXTS, "a</s>b <s>struck out</s> <unk>", "<0x0A><s>"]
    assert len(texts) > 300
    for text in texts:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids)
    assert len(theirs) == ours.vocab_size == 4096
    assert theirs.eos_token == "</s>" and theirs.eos_token_id == ours.eod == 1
    assert load_tokenizer(tmp_path / "hf").encode(texts[0]) == ours.encode(texts[0])


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    model = tmp_path / "tokenizer.model"
    train_sentencepiece(TEXTS[:3] * 20, model, vocab_size=330)
    with pytest.raises(ValueError, match=r"^tokenizer .* has 330 tokens, .* 104 rows: .* --resize-vocab 330$"):
        ready_tokenizer(model, 104)


def test_an_imported_tokenizer_comes_back_byte_for_byte(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "theirs", eos="<end>")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [256]}')
    assert ready_tokenizer(folder, 300).write(tmp_path / "out") == {"eos_token_id": 256}
    assert copy_tokenizer(tmp_path / "out", tmp_path / "again")
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config\.json is no JSON object"):
        ready_tokenizer(folder, 300)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "again")
    chat = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<user>hi<end>" and loaded.eos_token_id == 256
    assert not copy_tokenizer(tmp_path, tmp_path / "nothing")


def test_settings_of_generation_come_back(tmp_path: Path) -> None:
    shape: dict[str, Any] = dict(layers=8, hidden=16, heads=2, kv_heads=1, head_dim=8, ffn=8, experts=2)
    model = build(**shape, vocab=300, rotary_dim=8, rope_theta=1e4, softmax_every=8, alpha=2.0, seed=9)
    model.save_pretrained(tmp_path / "hub")
    hugging_face_folder(tmp_path / "hub", eos="<end>")
    settings = {"bos_token_id": 5, "eos_token_id": [256, 7], "temperature": 0.9}
    (tmp_path / "hub/generation_config.json").write_text(json.dumps(settings))
    convert("from-hf", tmp_path / "hub", tmp_path / "ours")
    convert("to-hf", tmp_path / "ours", tmp_path / "again")
    assert json.loads((tmp_path / "again/generation_config.json").read_text()) == settings
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (5, 256)


def test_several_ends_of_config_json_come_back(tmp_path: Path) -> None:
    """Without a generation_config.json; and one that nothing else names ends texts in every copy."""
    shape: dict[str, Any] = dict(layers=8, hidden=16, heads=2, kv_heads=1, head_dim=8, ffn=8, experts=2)
    model = build(**shape, vocab=300, rotary_dim=8, rope_theta=1e4, softmax_every=8, alpha=2.0, seed=9)
    hub = tmp_path / "hub"
    model.save_pretrained(hub)
    (hub / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((hub / "config.json").read_text())
    for name, mark, ends, exported in (
        ("several", "<end>", [7, 256], [7, 256]),
        ("others", "<end>", [7, 8], 256),
        ("one", "<end>", 2, 256),
        ("unnamed", None, 3, 3),
    ):
        hugging_face_folder(hub, eos=mark)
        (hub / "config.json").write_text(json.dumps(config | {"bos_token_id": None, "eos_token_id": ends}))
        convert("from-hf", hub, tmp_path / name / "ours")
        convert("to-hf", tmp_path / name / "ours", tmp_path / name / "again")
        again = tmp_path / name / "again"
        assert json.loads((again / "config.json").read_text())["eos_token_id"] == exported, name
        generation = json.loads((again / "generation_config.json").read_text())
        assert generation["eos_token_id"] == exported, name
        copy = tmp_path / name / "ours/tokenizer"
        assert all(file.read_bytes() == (hub / file.name).read_bytes() for file in copy.iterdir())
        places = (hub, tmp_path / name / "ours/tokenizer", again)
        assert len({(load_tokenizer(place).eod, load_tokenizer(place).digest()) for place in places}) == 1, name


def test_an_imported_folder_is_exported_with_the_files_that_it_came_with(tmp_path: Path) -> None:
    """Whatever hub folders carry for a tokenizer, byte for byte; its code is copied and never run."""
    shape: dict[str, Any] = dict(layers=8, hidden=16, heads=2, kv_heads=1, head_dim=8, ffn=8, experts=2)
    model = build(**shape, vocab=300, rotary_dim=8, rope_theta=1e4, softmax_every=8, alpha=2.0, seed=9)
    hub = tmp_path / "hub"
    model.save_pretrained(hub)
    hugging_face_folder(hub, eos="<end>")
    config = json.loads((hub / "tokenizer_config.json").read_text())
    (hub / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}, indent=7))
    (hub / "generation_config.json").write_text('{"temperature":0.9,\n\n"eos_token_id":[256]}')
    names = ["special_tokens_map.json", "added_tokens.json"]
    for name in names:
        (hub / name).write_text("{ }\n")
    names += ["vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tokenizer.model.v3", "spiece.model"]
    names += ["LICENSE", "NOTICE.txt"]
    names += ["tekken.json", "m1.tiktoken", "chat_template.jinja", "chat_template.json", "normalizer.json"]
    names += ["chat_templates/tool.jinja", "additional_chat_templates/rag.jinja", "tokenization_m1.py"]
    for name in names[2:]:
        (hub / name).parent.mkdir(exist_ok=True)
        (hub / name).write_bytes(f"\xef{name}\r\n raise SystemExit".encode("latin-1"))
    names += ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    assert left_behind(hub) == []
    for name in ("README.md", "configuration_minimax_m1.py", ".gitattributes"):
        (hub / name).touch()
    assert left_behind(hub) == [
        f"left in {hub}, and not exported again: README.md, configuration_minimax_m1.py; to-hf takes the model's code"
        " with --remote-code"
    ]
    convert("from-hf", hub, tmp_path / "ours")
    convert("to-hf", tmp_path / "ours", tmp_path / "again")
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (hub / name).read_bytes(), name
    digests = {load_tokenizer(place).digest() for place in (hub, tmp_path / "ours/tokenizer", tmp_path / "again")}
    assert len(digests) == 1, "corpora of one are corpora of the others"
    assert json.loads((tmp_path / "again/config.json").read_text())["eos_token_id"] == 256


def test_what_was_assumed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub = hugging_face_folder(tmp_path / "hub", eos="<end>")
    config = json.loads((hub / "tokenizer_config.json").read_text())
    (hub / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    (tmp_path / "in.jsonl").write_text('{"text": "a b"}\n' * 50)
    words = ["tokenize", str(tmp_path / "in.jsonl"), "--tokenizer", str(hub), "--output", str(tmp_path / "out")]
    assert run([*words, "--workers", "2"]) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count("the ids are those of tokenizer.json") == 1


def test_a_disk_that_refuses_the_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tokenizers raises what is no OSError; a folder where its file belongs stands for a disk that is full."""
    shape: dict[str, Any] = dict(layers=8, hidden=16, heads=2, kv_heads=1, head_dim=8, ffn=8, experts=2)
    model = build(**shape, vocab=330, rotary_dim=8, rope_theta=1e4, softmax_every=8, alpha=2.0, seed=9)
    model.save_pretrained(tmp_path / "native")
    convert("from-hf", tmp_path / "native", tmp_path / "ours")
    train_sentencepiece(TEXTS[:3] * 20, tmp_path / "t.model", vocab_size=330)
    words = [
        "convert",
        "to-hf",
        str(tmp_path / "ours"),
        str(tmp_path / "out"),
        "--tokenizer",
        str(tmp_path / "t.model"),
    ]
    with file_size_limit(5_000):
        assert run(words) == 1
    (tmp_path / "out.partial/tokenizer.json").mkdir()
    capsys.readouterr()
    assert run(words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "out.partial can't be written: " in error and "tokenizer.json: Is a dir" in error
    (tmp_path / "out.partial/tokenizer.json").rmdir()
    assert run(words) == 0
    assert load_tokenizer(tmp_path / "out").vocab_size == 330


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "it is no BPE model"),
        ({"byte_fallback": False}, "it has no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"it normalises text \(nmt_nfkc\)"),
        ({"remove_extra_whitespaces": True}, "it removes spaces"),
        (
            {"add_dummy_prefix": True, "user_defined_symbols": ["<tool>"]},
            r"it puts a space before texts, and has symbols: \['<tool>'\]",
        ),
        ({"user_defined_symbols": ["x\u2581y"]}, r"it has symbols with spaces: \['x\u2581y'\]"),
    ],
)
def test_models_without_an_exact_counterpart(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "t"),
        vocab_size=330,
        hard_vocab_limit=False,
        minloglevel=2,
        **(settings | options),
    )
    with pytest.raises(ValueError, match=rf"has no exact Hugging Face counterpart: {reason}$"):
        ready_tokenizer(tmp_path / "t.model", 1000)


@pytest.mark.parametrize(
    ("prefix", "symbols"), [(True, ["\n"]), (False, ["<tool>", "<to", "\n"])], ids=["prefix", "symbols"]
)
def test_a_model_with_a_dummy_prefix_or_symbols(prefix: bool, symbols: list[str], tmp_path: Path) -> None:
    """A begin mark and, as Llama's, a space before every text; or symbols of several characters."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(inspect).splitlines()),
        model_prefix=str(tmp_path / "t"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        user_defined_symbols=symbols,
        minloglevel=2,
    )
    ready_tokenizer(tmp_path / "t.model", 500).write(tmp_path / "hf")
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in [
        "def f(x): return x",
        "no space",
        "two  spaces",
        "a b\nc 🙂",
        "call <tool>now<to <t <s>",
        "<tool> <tool>",
    ]:
        assert theirs.encode(text, add_special_tokens=False) == own.encode(text), text
        assert theirs.decode(own.encode(text)) == text
    assert theirs.bos_token == "<s>"
