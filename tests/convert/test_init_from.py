"""Continued pre-training of an imported model, and what comes out of it again."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from torch.nn.functional import cross_entropy

from megatron_m1.checkpoint.contents import read_checkpoint
from megatron_m1.convert.tokenizer import ready_tokenizer
from megatron_m1.data.tokenizers import load_tokenizer
from megatron_m1.runtime.pool import WorkerPool
from tests.convert import runs
from tests.convert.folders import convert
from tests.convert.test_generate import prompts_of
from tests.convert.test_transformers import load
from tests.data.corpora import write_corpus
from tests.data.test_tokenizers import hugging_face_folder
from tests.reference.transformers_minimax import build
from tests.training.conftest import tiny_corpus  # noqa: F401
from tests.training.loop_runs import records

STEPS = 50
TEXT = "def convert(path):\n    return 42  # naïve\n"
VOCAB = 504
SHAPE: dict[str, Any] = {"layers": 8, "hidden": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "ffn": 24, "experts": 4}
LOSS_TOLERANCE = 1e-5
"""Relative; a mean over 300 tokens of logits that agree to 1e-4."""


def settings(folder: Path, corpus: dict[str, Any], ranks: int = 2, **changes: Any) -> list[str]:
    """Options of a run in ``folder``, on two ranks TP2 x EP2."""
    tree: dict[str, Any] = {
        "data": {**corpus, "seq_length": 64},
        "parallel": {"tensor_model_parallel_size": ranks, "expert_model_parallel_size": ranks},
        "optimizer": {"lr": 3e-3},
        "train": {"global_batch_size": 4, "eval_samples": 4, "max_steps": 1, **changes},
        "run": {"folder": str(folder), "tensorboard": False},
    }
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree))
    return ["--config", str(file)]


def pretrain_command(rank: int, world_size: int, words: list[str]) -> int:
    """``megatron-m1 pretrain`` as torchrun's workers run it."""
    from megatron_m1.cli import run

    return run(["pretrain", *words])


def pretrain(workers: WorkerPool, *words: object, ranks: int = 2) -> None:
    statuses = workers.run(pretrain_command, [str(word) for word in words], world_size=ranks, process_group=False)
    assert statuses == [0] * ranks


def generate_command(rank: int, world_size: int, words: list[str]) -> str:
    """What ``megatron-m1 generate`` prints."""
    from megatron_m1.cli import run

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run(["generate", *words]) == 0
    return printed.getvalue()


def loss_of(logits: torch.Tensor, tokens: list[int]) -> float:
    return float(cross_entropy(logits[:-1], torch.tensor(tokens[1:])))


def check_card(run_folder: Path, out: Path) -> None:
    """What was trained, on what, from which weights; and their licence, which has come with them."""
    assert (run_folder / "licences/LICENSE").read_text() == (out / "LICENSE").read_text() == "the model's"
    card = ModelCard.load(out / "README.md")
    fields = card.data.to_dict()
    assert (fields["license"], fields["license_link"]) == ("other", "LICENSE")
    assert f"{STEPS * 4 * 64:,} tokens in {STEPS} steps of 4 packs of 64 tokens, in fp32." in card.content
    assert "began with the weights of `theirs`" in card.content and "\n- `train`: 100.0%\n" in card.content
    assert "| Tokenizer | a SentencePiece BPE model, converted, 500 ids, 1 ends documents |" in card.content
    assert str(out.parent) not in card.content


def test_fifty_steps_from_a_hugging_face_folder(
    workers: WorkerPool,
    tmp_path: Path,
    tiny_corpus: dict[str, Any],  # noqa: F811
) -> None:
    theirs = tmp_path / "theirs"
    model = build(**SHAPE, vocab=VOCAB, rotary_dim=16, rope_theta=1e4, softmax_every=8, alpha=2.0, seed=6)
    model.save_pretrained(theirs)
    (theirs / "LICENSE").write_text("the model's")
    first = tmp_path / "first"
    options = settings(first, tiny_corpus, ranks=1, max_steps=STEPS)
    pretrain(workers, *options, "--init-from", f"hf:{theirs}", ranks=1)
    assert (first / "initial" / "checkpoints" / "step_00000000" / "integrity.json").is_file()
    assert read_checkpoint(first / "checkpoints" / f"step_{STEPS:08d}").config.model.num_moe_experts == 4

    convert("to-hf", first, tmp_path / "out", "--max-positions", "4096", "--verify")
    check_card(first, tmp_path / "out")
    exported, own = load_tokenizer(tmp_path / "out"), load_tokenizer(tiny_corpus["tokenizer"])
    assert exported.encode(TEXT) == own.encode(TEXT) and exported.eod == own.eod
    tokens = prompts_of([300], VOCAB)
    (ours,) = workers.run(runs.logits_of, first, tokens, world_size=1)
    with torch.no_grad():
        after = load(tmp_path / "out")(torch.tensor(tokens)).logits[0]
        before = load(theirs)(torch.tensor(tokens)).logits[0]
    assert loss_of(after, tokens[0]) == pytest.approx(loss_of(ours, tokens[0]), rel=LOSS_TOLERANCE)
    assert loss_of(after, tokens[0]) != pytest.approx(loss_of(before, tokens[0]), rel=0.01)

    # The run and what was exported of it say the same, one prompt or two, each with its own tokenizer.
    words = ["--prompt", "def ", "--max-tokens", "12", "--temperature", "1"]
    texts = [workers.run(generate_command, [str(place), *words], world_size=1) for place in (first, tmp_path / "out")]
    assert texts[0] == texts[1] and texts[0][0].startswith("def ") and len(texts[0][0]) > len("def \n")
    (both,) = workers.run(generate_command, [str(first), *words, "--prompt", "class Reader:"], world_size=1)
    assert both.startswith(f"--- def \n{texts[0][0]}--- class Reader:\nclass Reader:")

    losses = [line["loss"] for line in records(first) if "loss" in line]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5
    # A run that starts from it sees the loss that it ended with, whichever way the weights have taken.
    starts = {}
    nameless = {name: value for name, value in tiny_corpus.items() if name != "tokenizer"}
    for name, source, corpus in (("run", first, nameless), ("hub", f"hf:{tmp_path / 'out'}", tiny_corpus)):
        pretrain(workers, *settings(tmp_path / name, corpus), "--init-from", source)
        starts[name] = records(tmp_path / name)[0]["loss"]
    assert starts["run"] == starts["hub"] < losses[0] - 0.5
    assert starts["run"] == pytest.approx(losses[-1], abs=0.5)

    # A run that ended before its first checkpoint goes on from what it had converted, unless the source is another now.
    shutil.rmtree(tmp_path / "hub" / "checkpoints")
    os.utime(tmp_path / "out" / "model.safetensors.index.json", (0, 0))
    with pytest.raises(ValueError, match=r"out has changed since .*hub/initial was made of it: remove this, or choose"):
        pretrain(workers, *settings(tmp_path / "hub", tiny_corpus), "--init-from", f"hf:{tmp_path / 'out'}")

    # Where the weights came from is not needed any more.
    shutil.rmtree(theirs)
    options = settings(first, tiny_corpus, ranks=1, max_steps=STEPS + 1)
    pretrain(workers, *options, "--init-from", f"hf:{theirs}", ranks=1)
    assert records(first)[-1]["step"] == STEPS + 1


def test_the_tokenizer_is_that_of_the_weights(
    tmp_path: Path,
    tiny_corpus: dict[str, Any],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a folder and of an imported one; a corpus that another has made is refused; one that is named comes first."""
    theirs, other = tmp_path / "theirs", hugging_face_folder(tmp_path / "other")
    build(**SHAPE, vocab=VOCAB, rotary_dim=16, rope_theta=1e4, softmax_every=8, alpha=2.0, seed=6).save_pretrained(
        theirs
    )
    ready_tokenizer(Path(tiny_corpus["tokenizer"]), VOCAB).write(theirs)
    convert("from-hf", theirs, tmp_path / "ours")
    prefix = write_corpus(tmp_path / "web", [[5, 6, 7, 1]] * 50, tokenizer_digest=load_tokenizer(theirs).digest())
    from megatron_m1.cli import run

    options = settings(tmp_path / "run", {"train": [prefix]}, ranks=1)
    for source, place in ((f"hf:{theirs}", theirs), (tmp_path / "ours", tmp_path / "ours/tokenizer")):
        words = ["pretrain", *options, "--init-from", str(source), "--dry-run"]
        capsys.readouterr()
        assert run(words) == 0
        assert f"\ntokenizer   {place}, 500 tokens\n" in capsys.readouterr().out
        with pytest.raises(ValueError, match=r"^data\.train: .*/train was tokenised with another tokenizer"):
            run([*words, "--data.train", f"[{tiny_corpus['train'][0]}]"])
        with pytest.raises(ValueError, match=r"^data\.train: .*/web was tokenised with another tokenizer"):
            run([*words, "--data.tokenizer", str(other)])
        assert run([*words, "--data.tokenizer", tiny_corpus["tokenizer"], "--data.train", tiny_corpus["train"][0]]) == 0


def test_a_folder_of_imported_weights_is_no_run_to_resume(
    workers: WorkerPool,
    tmp_path: Path,
    tiny_corpus: dict[str, Any],  # noqa: F811
) -> None:
    theirs = tmp_path / "theirs"
    build(**SHAPE, vocab=VOCAB, rotary_dim=16, rope_theta=1e4, softmax_every=8, alpha=2.0, seed=6).save_pretrained(
        theirs
    )
    convert("from-hf", theirs, tmp_path / "run")
    assert json.loads((tmp_path / "run/checkpoints/step_00000000/state.json").read_text())["weights_only"]
    with pytest.raises(ValueError, match=r"holds imported weights and no optimizer state: give it to --init-from"):
        pretrain(workers, *settings(tmp_path / "run", tiny_corpus), "--init-from", tmp_path / "run")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:", r"^run\.init_from = hf: names no folder: give hf:FOLDER$"),
        (
            "hf:{}/nowhere",
            r"nowhere is no folder: .* local folder, .* hf download ORGANISATION/NAME --local-dir FOLDER$",
        ),
        (
            "hf:org/name",
            r"^org/name is no folder: .* nothing is downloaded; .* hf download org/name --local-dir FOLDER$",
        ),
        ("hf:{}", r"config\.json can't be read: No such file"),
        ("{}/nowhere", r"nowhere is no folder: give a checkpoint or a run folder"),
        ("{}/run/checkpoints", r"has no complete one below checkpoints/"),
        ("{}/folder", r"folder is a Hugging Face folder, no checkpoint .*: to start a run from it give hf:.*/folder, "),
        (
            "hf:{}/run",
            r"run is a run or a checkpoint, no Hugging Face folder: to start a run from it give --init-from ",
        ),
        ("hf:{}/run/checkpoints/step_00000001", r"is a run or a checkpoint, .* give --init-from "),
    ],
)
def test_wrong_sources(tmp_path: Path, source: str, message: str) -> None:
    from megatron_m1.cli import run

    (tmp_path / "run/checkpoints/step_00000001").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step_00000001/metadata.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        run(["pretrain", "--init-from", source.format(tmp_path), "--dry-run"])


def test_another_shape_than_the_weights(tmp_path: Path) -> None:
    from megatron_m1.cli import run

    build(**SHAPE, vocab=VOCAB, rotary_dim=16, rope_theta=1e4, softmax_every=8, alpha=2.0, seed=6).save_pretrained(
        tmp_path
    )
    words = ["pretrain", "--init-from", f"hf:{tmp_path}", "--dry-run", "--model.num_layers", "16"]
    with pytest.raises(ValueError, match=r"^model\.num_layers is 16, but .* has 8: leave that to the weights"):
        run(words)
    words = ["pretrain", "--init-from", f"hf:{tmp_path}", "--dry-run", "--model.vocab_size", "640"]
    with pytest.raises(
        ValueError, match=r"^model\.vocab_size is 640, but .* has 504: .* --resize-vocab 640 makes more"
    ):
        run(words)
