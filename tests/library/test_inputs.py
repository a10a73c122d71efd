"""What can't be asked is said in one line, and models without memory."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_m1
from megatron_m1.config.presets import PRESETS
from megatron_m1.data.packed import PackedSample
from megatron_m1.library.quiet import LOGGERS, quiet_libraries
from tests.library.conftest import Reference

PACK = PackedSample(torch.tensor([1, 2, 3]), torch.tensor([2, 3, 4]), torch.ones(3), torch.tensor([0, 3]))


@pytest.fixture(scope="module")
def model(reference: Reference) -> megatron_m1.Model:
    return megatron_m1.load(reference.folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the input is empty: give a text, ids or a pack"),
        (torch.empty(0, dtype=torch.long), "the input is empty"),
        ([[1], []], "a sequence is empty: this model has no begin mark"),
        ([1, 99], "id 99 is not among the model's 99: it is another tokenizer's"),
        ([[5], [-1]], "id -1 is not among"),
        ([1, 2.5], "an input holds something other than ids"),
        (torch.tensor([0.5]), r"ids are torch\.float32 of shape \[1\]: give integers"),
        (torch.zeros(1, 1, 1, dtype=torch.long), r"of shape \[1, 1, 1\]: give integers of shape \[n\]"),
        ("a text", r"names no tokenizer: give load\(\.\.\., tokenizer=PATH\)|tokenizer=PATH"),
        (5, "an input is of type int: give a text, ids or a pack"),
        (None, "an input is of type NoneType: give"),
        ([[1], None], "an input is of type NoneType: give"),
        (torch.tensor(3).numpy(), "an input is of type ndarray: give"),
        (b"abc", "an input is of type bytes: give a text, ids"),
        ({1, 2}, "an input is of type set: give"),
        ({"input_ids": [1, 2]}, r"an input is of type dict: give its ids by themselves, such as x\['input_ids'\]"),
        ([{"input_ids": [1, 2]}], "an input is of type dict: give its ids"),
        (torch.tensor([True]), r"ids are torch\.bool of shape \[1\]"),
        (
            [torch.zeros(1, 1, dtype=torch.long)],
            r"ids are torch\.int64 of shape \[1, 1\]: give integers of shape \[n\]$",
        ),
        (torch.zeros(2, dtype=torch.long, device="meta"), r"ids are on meta .*: give a dense tensor"),
        (torch.tensor([1, 0]).to_sparse(), r"torch\.sparse_coo: give a dense tensor"),
        (replace(PACK, tokens=torch.tensor([1, 2, 99])), "id 99 is not among"),
        (replace(PACK, labels=torch.tensor([2, 3, 99])), "id 99 is not among"),
        (replace(PACK, cu_seqlens=torch.tensor([0, 2])), "a pack of 3 tokens has cu_seqlens that end at 2"),
        (replace(PACK, cu_seqlens=torch.tensor([0, 2, 1, 3])), "bounds must rise strictly"),
        (replace(PACK, loss_mask=torch.ones(2)), "a pack of 3 tokens has 2 loss_mask: give one a token"),
    ],
)
def test_wrong_inputs(model: megatron_m1.Model, given: Any, message: str) -> None:
    for ask in (model.logits, model.loss):
        with pytest.raises(ValueError, match=message) as caught:
            ask(given)
        assert "\n" not in str(caught.value)


def test_right_inputs_of_other_kinds(model: megatron_m1.Model) -> None:
    right = model.logits([1, 2, 3])
    assert torch.equal(model.logits((1, 2, 3)), right)
    array: Any = torch.tensor([1, 2, 3]).numpy()
    assert torch.equal(model.logits(array), right)
    assert torch.equal(model.logits(range(1, 4)), right)
    assert torch.equal(model.logits(torch.tensor([1, 2, 3], dtype=torch.int32)), right)
    assert torch.equal(model.logits(PACK), right)
    (one,) = model.logits(iter([[1, 2, 3]]))
    assert torch.equal(one, right)


def test_nothing_to_predict(model: megatron_m1.Model) -> None:
    with pytest.raises(ValueError, match="nothing is predicted: give a sequence of 2 tokens or more"):
        model.loss([[1], [2]])
    assert [tuple(losses.shape) for losses in model.loss([[1], [2, 3]], per_token=True)] == [(0,), (1,)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens = 0: give 1 or more"),
        ({"temperature": -1}, "temperature = -1: give 0"),
        ({"max_tokens": 1.5}, r"max_tokens = 1\.5: give an integer"),
        ({"chunk_tokens": None}, "chunk_tokens = None: give an integer"),
        ({"seed": "1"}, "seed = '1': give an integer"),
        ({"top_p": None}, "top_p = None: give a number"),
        ({"prompts": [[1], PACK]}, "a pack can't be continued"),
        ({"prompts": [1, 99]}, "id 99 is not among"),
    ],
)
def test_wrong_generation(model: megatron_m1.Model, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**({"prompts": [1, 2]} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, "device = 'gpu': give auto, cpu, cuda or cuda:N"),
        ({"device": "meta"}, "device = 'meta': give auto, cpu, cuda or cuda:N, or call meta_model"),
        ({"device": "cuda:4096"}, "device = 'cuda:4096', but "),
        ({"dtype": "fp8"}, "dtype = 'fp8': give fp32 or bf16"),
        ({"dtype": torch.int64}, r"dtype = 'torch\.int64': give fp32 or bf16"),
        ({"tokenizer": "gone.model"}, r"tokenizer gone\.model does not exist; .*; give load\(\.\.\., tokenizer=PATH\)"),
        ({"tokenizer": 5}, "tokenizer is of type int, without encode, decode, eod, vocab_size: give its path"),
    ],
)
def test_wrong_devices_dtypes_and_tokenizers(reference: Reference, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        megatron_m1.load(reference.folder, **arguments)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "None is no path: give a text"),
        ("", "'' is no path: give a text that is not empty"),
        (b"folder", "b'folder' is no path"),
        ({"num_layers": 3}, r"\{'num_layers': 3\} is no path"),
        ("hf:folder", "hf:folder: hf: is for --init-from only, give the folder by itself: folder$"),
    ],
)
def test_what_is_no_path(path: Any, message: str) -> None:
    for ask in (megatron_m1.load, megatron_m1.parameter_counts, megatron_m1.meta_model):
        with pytest.raises(ValueError, match=message):
            ask(path)


def test_silence_of_several_threads_ends() -> None:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [logger.level for logger in loggers], list(warnings.filters)

    def be_quiet() -> None:
        for _ in range(300):
            with quiet_libraries():
                time.monotonic()

    threads = [threading.Thread(target=be_quiet) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ([logger.level for logger in loggers], list(warnings.filters)) == before


def test_a_home_folder_is_found(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(reference.folder.parent))
    path = f"~/{reference.folder.name}"
    assert megatron_m1.parameter_counts(path).total == megatron_m1.parameter_counts(reference.folder).total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": 5}, "source = 5: give a run"),
        ({"source": {"web": 1}}, r"source = \{'web': 1\}: give a run"),
        ({"seq_length": 1}, "seq_length = 1: give an integer from 2"),
        ({"seq_length": "8"}, "seq_length = '8': give an integer"),
        ({"num_samples": 0}, "num_samples = 0: give an integer from 1"),
        ({"seed": -1}, "seed = -1: give an integer from 0 to 4,294,967,295"),
    ],
)
def test_wrong_questions_for_packs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        megatron_m1.packed_data(**({"source": "web"} | arguments))


def test_a_tokenizer_that_is_given(reference: Reference, tmp_path: Path) -> None:
    """By its path or itself."""
    texts = ["one two three four five six seven eight nine ten"] * 3
    path = tmp_path / "t.model"
    from megatron_m1.data.tokenizers import load_tokenizer, train_sentencepiece

    train_sentencepiece(texts, path, vocab_size=275)
    for tokenizer in (path, str(path), load_tokenizer(path)):
        model = megatron_m1.load(reference.folder, tokenizer=tokenizer)
        assert model.tokenizer is not None and model.tokenizer.vocab_size == 275
        with pytest.raises(ValueError, match=r"has 275 tokens, the model's embedding 99 rows: .* --resize-vocab 275"):
            model.logits("seven")


@pytest.mark.parametrize("name", PRESETS)
def test_models_without_memory(name: str) -> None:
    model = megatron_m1.meta_model(name)
    counts = megatron_m1.parameter_counts(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == counts.total
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16, torch.float32}
    assert counts.total == counts.all.total > counts.active.total
    assert sum(layer.total for layer in counts.layers) < counts.total
    if name == "m1-456b":
        assert (counts.total, counts.active.total) == (456_089_655_296, 48_403_306_496)


def test_what_can_be_described(reference: Reference) -> None:
    """A preset, a configuration of any kind, a folder."""
    shape = megatron_m1.ModelConfig(num_layers=16, hidden_size=64, vocab_size=128, moe_ffn_hidden_size=32)
    config = megatron_m1.Config(model=shape)
    assert megatron_m1.parameter_counts(shape) == megatron_m1.parameter_counts(config)
    held = sum(parameter.numel() for parameter in reference.model.parameters())
    assert megatron_m1.parameter_counts(reference.folder).total == held
    meta = megatron_m1.meta_model(str(reference.folder), dtype=torch.float32)
    assert sum(parameter.numel() for parameter in meta.parameters()) == held
    with pytest.raises(ValueError, match=r"model\.num_moe_experts = 0"):
        megatron_m1.meta_model(replace(shape, num_moe_experts=0))
