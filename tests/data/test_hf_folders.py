"""Hugging Face folders of many kinds: the ids of their ``tokenizer.json``, and no code of theirs is run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from megatron_m1.data.tokenizers import load_tokenizer, train_sentencepiece

ODD_TEXTS = [
    "",
    " ",
    "a",
    "cafe\u0301 caf\u00e9 \ufb01 \u212b Straße İ",
    "🙂👩\u200d👩\u200d👧 🇩🇪",
    "中文 測試 日本語カタカナ",
    "\x00\x01\x1f control \x7f",
    "a      b\t\t\tc  ",
    "x\r\ny\r\n\r\nz",
    "</s> <s> <unk> [CLS] [SEP] <end><end> <mark> <tool>x</tool> <|im_end|>",
    "1234567 3.14 2024-01-31",
    "\u2581under\u2581 \u2581",
    "\u0301\u0301 lone marks",
    "don't WE'LL it's",
    "\u200b\u200d\ufeff\u00a0\u3000\ue000\ufffd",
    "xl <left> y <right>   z  <word>a <word> b <LOUD> <loud>",
    "long " * 600,
]
CORPUS = ["in 2024 and 1999 the cafe don't stop 中文 🙂 "] * 20


def byte_level(split: pre_tokenizers.PreTokenizer | None = None, **settings: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("prefix", False), use_regex=split is None)
    tokenizer.pre_tokenizer = level if split is None else pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    if "normalizer" in settings:
        tokenizer.normalizer = settings["normalizer"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ["<end>", "<mark>"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=marks, show_progress=False),
    )
    return tokenizer


def framed() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<mark> $A <end>", special_tokens=[("<mark>", 1), ("<end>", 0)]
    )
    return tokenizer


def cut_short() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50, pad_id=0, pad_token="<end>")
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "<end>", "<mark>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    marks = ["[UNK]", "[CLS]", "[SEP]", "<end>", "<mark>"]
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=marks, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    pieces = [*(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abcdefgh", "<unk>", "\u2581a", "<end>", "<mark>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [("\u2581", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<end>", "<mark>"])
    return tokenizer


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens(
        [
            AddedToken("<left>", lstrip=True),
            AddedToken("<right>", rstrip=True),
            AddedToken("<word>", single_word=True),
            AddedToken("<LOUD>", normalized=True),
            AddedToken("<tool>", normalized=False),
        ]
    )
    return tokenizer


DIGITS = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\p{N}]+"), "isolated")
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "prefix space": lambda: byte_level(prefix=True),
    "digits": lambda: byte_level(DIGITS),
    "nfc": lambda: byte_level(DIGITS, normalizer=normalizers.NFC()),
    "stripped": lambda: byte_level(
        normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    ),
    "framed": framed,
    "cut short": cut_short,
    "unigram": unigram,
    "word piece": word_piece,
    "byte fallback": byte_fallback,
    "added": lambda: with_added(byte_level()),
    "added, digits": lambda: with_added(byte_level(DIGITS)),
    "added, unigram": lambda: with_added(unigram()),
    "added, word piece": lambda: with_added(word_piece()),
}
CLASSES = ["GPT2Tokenizer", "Qwen2TokenizerFast", "RobertaTokenizer", "T5Tokenizer", "BertTokenizer", None]


def folder_of(tokenizer: Tokenizer | None, folder: Path, **files: object) -> Path:
    """A folder of that ``tokenizer.json``, and of JSON files by their names without suffix."""
    folder.mkdir(exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def token(content: str, **flags: bool) -> dict[str, object]:
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
    return {"content": content, **plain, **flags}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_tokenizer_json(tmp_path: Path, kind: str) -> None:
    truth = KINDS[kind]()
    for name in CLASSES:
        config = {"eos_token": "<end>", "add_prefix_space": True, "model_max_length": 5, "do_lower_case": True}
        config |= {"clean_up_tokenization_spaces": True, "add_bos_token": True, "tokenizer_class": name}
        path = folder_of(truth, tmp_path, tokenizer_config=config, config={"model_type": "minimax_m1"})
        raw = Tokenizer.from_file(str(path / "tokenizer.json"))
        raw.no_truncation()
        raw.no_padding()
        raw.encode_special_tokens = True
        tokenizer = load_tokenizer(path)
        expected = [raw.encode(text, add_special_tokens=False).ids for text in ODD_TEXTS]
        assert [tokenizer.encode(text) for text in ODD_TEXTS] == expected
        assert tokenizer.encode_batch(ODD_TEXTS) == expected
        assert [tokenizer.decode(ids) for ids in expected] == [raw.decode(ids, False) for ids in expected]
        assert tokenizer.eod == raw.token_to_id("<end>")
        assert any("tokenizer.json; where transformers 5" in note for note in tokenizer.notes) == (name is not None)
        assert tokenizer.vocab_size == 1 + max(raw.get_vocab().values())


@pytest.mark.parametrize("kind", ["digits", "unigram", "word piece", "added, digits", "added, unigram"])
@pytest.mark.parametrize("listed", ["decoder", "flags", "older file", "marks"])
def test_what_other_files_add(tmp_path: Path, kind: str, listed: str) -> None:
    """As transformers has it for the class that takes ``tokenizer.json`` as it is."""
    truth = KINDS[kind]()
    end, new = truth.token_to_id("<end>"), 1 + max(truth.get_vocab().values())
    config: dict[str, object] = {"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}
    files: dict[str, object] = {"tokenizer_config": config}
    if listed == "decoder":
        decoder = {new + 1: token("</tool>", lstrip=True), end: token("<end>", special=True), new: token("<|im_end|>")}
        config["added_tokens_decoder"] = decoder
    elif listed == "flags":
        mark = truth.token_to_id("<mark>")
        config["added_tokens_decoder"] = {end: token("<end>"), mark: token("<mark>", rstrip=True)}
    elif listed == "older file":
        files["added_tokens"] = {"</tool>": new + 1, "<|im_end|>": new}
        files["special_tokens_map"] = {"unk_token": token("<|im_end|>"), "eos_token": token("<end>")}
    else:
        config |= {
            "pad_token": "[PAD]",
            "bos_token": {"__type": "AddedToken", **token("<mark>")},
            "image_token": "<image>",
        }
        config["additional_special_tokens"] = ["<tool>", "<more>"]
    path = folder_of(truth, tmp_path, **files)
    tokenizer, theirs = load_tokenizer(path), PreTrainedTokenizerFast.from_pretrained(path)
    for text in ODD_TEXTS:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text
        assert tokenizer.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert (tokenizer.vocab_size, tokenizer.eod) == (1 + max(theirs.get_vocab().values()), theirs.eos_token_id)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<end>"}},
        {"tokenizer_config": {"eos_token": {"content": "<end>", "lstrip": False, "__type": "AddedToken"}}},
        {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "<end>"}},
        {"special_tokens_map": {"eos_token": {"content": "<end>", "single_word": False}}},
        {"tokenizer_config": {"eos_token": "<end>"}, "special_tokens_map": {"eos_token": "<mark>"}},
        {"generation_config": {"eos_token_id": 0}},
        {"generation_config": {"eos_token_id": [0]}},
        {"generation_config": {"eos_token_id": 0}, "config": {"eos_token_id": 5}},
        {"config": {"eos_token_id": 0}},
        {"generation_config": {"top_p": 0.9}, "config": {"eos_token_id": [0]}},
    ],
)
def test_where_the_end_mark_is_named(tmp_path: Path, files: dict[str, object]) -> None:
    tokenizer = load_tokenizer(folder_of(byte_level(), tmp_path, **files))
    assert tokenizer.eod == 0
    assert 0 not in tokenizer.encode("spelled <end> out")
    assert all("\n" not in note for note in tokenizer.notes)


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"tokenizer_config": {"eos_token": "<stop>"}}, r"tokenizer_config\.json: eos_token '<stop>' is no token of"),
        ({"special_tokens_map": {"eos_token": "<stop>"}}, r"special_tokens_map\.json: eos_token '<stop>' is no token"),
        ({"tokenizer_config": {"eos_token": "<end><end>"}}, "eos_token '<end><end>' is no token"),
        ({"generation_config": {"eos_token_id": [0, 1]}}, r"no eos_token to end documents with; set one in its"),
        ({"config": {"eos_token_id": [0, 1]}}, r"no eos_token to end documents with; set one in its"),
        ({"generation_config": {"eos_token_id": 5000}}, r"no eos_token to end documents with; set one in its"),
        (
            {"tokenizer_config": {"eos_token": "<end>", "added_tokens_decoder": {"900": token("<x>")}}},
            r"tokenizer_config\.json says that '<x>' is id 900, which tokenizer\.json lacks and would count as 300",
        ),
        ({"tokenizer_config": {"eos_token": "<end>", "added_tokens_decoder": {"x": 1}}}, "added tokens can't be read"),
        ({"tokenizer_config": []}, r"tokenizer_config\.json is no JSON object"),
    ],
)
def test_folders_that_contradict_themselves(tmp_path: Path, files: dict[str, object], fault: str) -> None:
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.add_tokens([f"<{i}>" for i in range(300 - tokenizer.get_vocab_size())])
    with pytest.raises(ValueError, match=fault) as raised:
        load_tokenizer(folder_of(tokenizer, tmp_path, **files))
    assert "\n" not in str(raised.value)


def test_a_token_with_two_ids_keeps_that_of_tokenizer_json(tmp_path: Path) -> None:
    config = {"eos_token": "<end>", "added_tokens_decoder": {"7": token("<mark>", special=True)}}
    tokenizer = load_tokenizer(folder_of(byte_level(), tmp_path, tokenizer_config=config))
    assert any("'<mark>' is id 7, but it is 1 as tokenizer.json says" in note for note in tokenizer.notes)


def test_thousands_of_declared_tokens_load_at_once(tmp_path: Path) -> None:
    """Added one by one, each of them costs a search that is built anew: a minute for 6,400."""
    truth = byte_level()
    truth.add_tokens([AddedToken(f"<unused{i}>", normalized=False) for i in range(4000)])
    first = truth.get_vocab()["<unused0>"]
    decoder = {first + i: token(f"<unused{i}>") for i in range(4000)}
    decoder |= {first + 4000: token("<new>"), first + 4001: token("<new>")}
    path = folder_of(truth, tmp_path, tokenizer_config={"eos_token": "<end>", "added_tokens_decoder": decoder})
    before = process_time()
    tokenizer = load_tokenizer(path)
    assert process_time() - before < 4.0
    assert tokenizer.encode("a<unused3999><new>") == [*truth.encode("a").ids, first + 3999, first + 4000]
    assert tokenizer.vocab_size == first + 4001
    assert any(f"'<new>' is id {first + 4001}, but it is {first + 4000}" in note for note in tokenizer.notes)


@pytest.mark.parametrize("name", ["tokenizer_config", "tekken"])
def test_a_folder_without_a_vocabulary(tmp_path: Path, name: str) -> None:
    """As an interrupted download leaves it."""
    folder_of(None, tmp_path, **{name: {"eos_token": "<end>"}}, config={"model_type": "minimax_m1"})
    with pytest.raises(ValueError, match=rf"has no tokenizer\.json, vocab or \.model \({name}\.json can't be used"):
        load_tokenizer(tmp_path)


def test_dropout_is_left_out(tmp_path: Path) -> None:
    truth = byte_level()
    expected = truth.encode("in 2024 and 1999 the cafe " * 9).ids
    truth.model.dropout = 0.9
    tokenizer = load_tokenizer(folder_of(truth, tmp_path, tokenizer_config={"eos_token": "<end>"}))
    assert tokenizer.encode("in 2024 and 1999 the cafe " * 9) == expected
    assert any("dropout" in note for note in tokenizer.notes)


@pytest.mark.parametrize(
    ("name", "same"), [("PreTrainedTokenizerFast", True), ("TokenizersBackend", True), ("GPT2Tokenizer", False)]
)
def test_digests_of_corpora_that_are_there_already(tmp_path: Path, name: str, same: bool) -> None:
    """They still count where the ids are what they were, and no longer where transformers cut texts its own way."""
    config = {"eos_token": "<end>", "tokenizer_class": name}
    path = folder_of(byte_level(), tmp_path, tokenizer_config=config, special_tokens_map={}, generation_config={})
    state = hashlib.sha256()
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        content = (path / file).read_bytes()
        state.update(f"{file} {len(content)}\n".encode() + content)
    assert (load_tokenizer(path).digest() == state.hexdigest()) == same


def test_vocab_and_merges(tmp_path: Path) -> None:
    byte_level().model.save(str(tmp_path))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<end>"}')
    tokenizer, theirs = load_tokenizer(tmp_path), GPT2Tokenizer.from_pretrained(tmp_path)
    assert [tokenizer.encode(text) for text in ODD_TEXTS] == [theirs.encode(text) for text in ODD_TEXTS[:9]] + [
        theirs.encode(text, split_special_tokens=True) for text in ODD_TEXTS[9:]
    ]
    (note,) = tokenizer.notes
    assert "has no tokenizer.json: taken to be what transformers" in note and "GPT2Tokenizer" in note
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<stop>"}')
    with pytest.raises(ValueError, match=r"eos_token '<stop>' is no token of vocab\.json and merges\.txt"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", [None, "LlamaTokenizer"])
def test_a_folder_with_a_sentencepiece_model(tmp_path: Path, name: str | None) -> None:
    train_sentencepiece(CORPUS, tmp_path / "tokenizer.model", vocab_size=290)
    folder_of(None, tmp_path, tokenizer_config={"tokenizer_class": name, "eos_token": "</s>"})
    tokenizer, alone = load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer.encode_batch(ODD_TEXTS) == alone.encode_batch(ODD_TEXTS)
    assert (tokenizer.vocab_size, tokenizer.eod) == (290, 1)
    assert len(tokenizer.notes) == 1 and "those that SentencePiece gives its tokenizer.model" in tokenizer.notes[0]


def test_no_folder_runs_its_code_or_asks(tmp_path: Path) -> None:
    """Files that leave a trace as soon as they are imported, and an answer on standard input that nobody reads."""
    own = {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"], "AutoConfig": "tokenization_x.X"}
    config = {"eos_token": "<end>", "tokenizer_class": "X"}
    model = {"model_type": "x", "auto_map": own}
    whole = folder_of(byte_level(), tmp_path / "whole", tokenizer_config=config | {"auto_map": own}, config=model)
    listed = {"auto_map": own["AutoTokenizer"]}
    bare = folder_of(None, tmp_path / "bare", tokenizer_config=config | listed, config=model)
    older = folder_of(None, tmp_path / "older", tokenizer_config=config | {"tokenizer_class": None}, config=model)
    for folder in (whole, bare, older):
        (folder / "tokenization_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n")
        byte_level().model.save(str(folder))
    script = """
import sys
from megatron_m1.data.tokenizers import load_tokenizer
for folder in sys.argv[1:]:
    try:
        print(len(load_tokenizer(folder).encode("a")))
    except ValueError as error:
        print(error)
print(sys.stdin.read())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(whole), str(bare), str(older)],
        input="y\ny\ny",
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "1" and lines[-3:] == ["y", "y", "y"]
    assert "its tokenizer is code of its own (tokenization_x.X), which is never run" in lines[1]
    assert len(lines) == 6 and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "vocab.json", "templates/chat.jinja", "x.model"]
)
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    """Also one that only transformers would open."""
    folder = tmp_path / "folder"
    (folder / "templates").mkdir(parents=True)
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} can't be read: no regular file: remove it"):
        load_tokenizer(folder)
    if name.endswith(".model"):
        with pytest.raises(OSError, match="no regular file"):
            load_tokenizer(folder / name)
