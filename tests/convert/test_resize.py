"""More rows for embedding and head: old ones bit for bit, new ones as asked, and transformers agrees on all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_m1.cli import run
from megatron_m1.config.io import load_config
from megatron_m1.data.tokenizers import load_tokenizer
from megatron_m1.runtime.pool import WorkerPool
from tests.checkpoint.checkpoint_runs import file_size_limit
from tests.convert import runs
from tests.convert.folders import convert, prints, weights
from tests.convert.killed import SHARD
from tests.convert.test_transformers import load, tolerance
from tests.data.test_tokenizers import hugging_face_folder
from tests.reference.transformers_minimax import build

OLD, NEW = 99, 130
"""Rows of the fixture ``hub``, and what they become."""
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
CHECKPOINT = Path("checkpoints/step_00000000")


def resize(hub: Path, out: Path, *words: object) -> dict[str, Tensor]:
    """Import with more rows, and export again: the tensors."""
    convert("from-hf", hub, out / "ours", "--verify", *words)
    convert("to-hf", out / "ours", out / "hub")
    return weights(out / "hub")


@pytest.mark.parametrize("init", ["mean", "normal", "zeros"])
def test_rows(init: str, hub: Path, tmp_path: Path) -> None:
    words = [] if init == "mean" else ["--resize-init", init]
    before, after = weights(hub / "hub"), resize(hub / "hub", tmp_path, "--resize-vocab", NEW, *words)
    for name in TABLES:
        old, new = before[name], after[name][OLD:]
        assert after[name].shape == (NEW, 48) and prints({name: after[name][:OLD]}) == prints({name: old})
        mean, deviation = old.double().mean(0), old.double().std(0, correction=0)
        if init == "mean":
            assert torch.equal(new, mean.float().expand(NEW - OLD, -1))
        elif init == "zeros":
            assert not new.any()
        else:
            # 31 draws a column: the mean's error is 1/5.6 of the deviation, and 6 of these are never met.
            assert ((new.double().mean(0) - mean).abs() < 6 * deviation / 5.6).all()
            assert len(new.unique(dim=0)) == NEW - OLD
            assert float((new.double() - mean).std() / deviation.square().mean().sqrt()) == pytest.approx(1, abs=0.1)
    assert not torch.equal(after[TABLES[0]][OLD:], after[TABLES[1]][OLD:]) or init == "zeros"
    rest = before.keys() - {*TABLES}
    assert after.keys() == before.keys()
    assert prints({name: after[name] for name in rest}) == prints({name: before[name] for name in rest})
    assert load_config(tmp_path / "ours" / CHECKPOINT / "config.yaml").model.vocab_size == NEW
    assert json.loads((tmp_path / "hub/config.json").read_text())["vocab_size"] == NEW
    card = (tmp_path / "hub/README.md").read_text()
    assert "The last 31 rows of embedding and head are untrained" in card


def test_low_precision_rounds_the_mean_of_what_is_stored(hub: Path, tmp_path: Path) -> None:
    convert("to-hf", hub / "ours", tmp_path / "low", "--dtype", "bf16")
    before, after = weights(tmp_path / "low"), resize(tmp_path / "low", tmp_path / "out", "--resize-vocab", NEW)
    for name in TABLES:
        assert after[name].dtype == torch.bfloat16 and torch.equal(after[name][:OLD], before[name])
        mean = before[name].double().mean(0)
        assert ((after[name][OLD].double() - mean).abs() <= 2**-8 * mean.abs()).all()


def test_transformers_and_ours_agree(hub: Path, workers: WorkerPool, tmp_path: Path) -> None:
    """Logits of old ids stay; a new id's logit is the mean of the old ones; its own resizing makes the same rows."""
    resize(hub / "hub", tmp_path, "--resize-vocab", NEW)
    old, new = load(hub / "hub"), load(tmp_path / "hub")
    assert new.config.vocab_size == NEW and new.get_input_embeddings().num_embeddings == NEW
    prompt = torch.randint(OLD, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before, after = old(prompt).logits[0], new(prompt).logits[0]
    bound = tolerance(before, [40])
    assert (after[:, :OLD] - before).abs().max() < bound
    assert (after[:, OLD:] - before.mean(1, keepdim=True)).abs().max() < bound
    # What was new can be read and written.
    ids = [*prompt[0].tolist(), OLD, NEW - 1, 5]
    (ours,) = workers.run(runs.logits_of, tmp_path / "ours", [ids], world_size=1)
    with torch.no_grad():
        theirs = new(torch.tensor([ids])).logits[0]
    assert ours.shape == theirs.shape == (43, NEW) and (ours - theirs).abs().max() < bound
    old.resize_token_embeddings(NEW)
    for name, value in old.state_dict().items():
        if name in TABLES:
            # transformers draws around the mean, with 3e-5 of the spread.
            assert (value - new.state_dict()[name]).abs().max() < 1e-3 * value.std()


def test_a_multiple_and_what_is_said(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: object) -> str:
        capsys.readouterr()
        convert("from-hf", hub / "hub", tmp_path / "out", "--dry-run", *words)
        return capsys.readouterr().out

    before, odd = said(), said("--resize-vocab", 130)
    assert "rows" not in before
    assert "note: embedding and head have 130 rows, 31 of them new, each the mean of the old ones\n" in odd
    assert "130 rows are no multiple of 128: " in odd and "--resize-multiple 128 makes them 256\n" in odd
    rounded = said("--resize-vocab", 130, "--resize-multiple", 128, "--resize-init", "zeros")
    assert "note: embedding and head have 256 rows, 157 of them new, of zeros\n" in rounded
    assert "no multiple" not in rounded
    sizes = [int(text.split(" bytes of weights")[0].split()[-1].replace(",", "")) for text in (before, odd, rounded)]
    assert [size - sizes[0] for size in sizes] == [0, 2 * 31 * 48 * 4, 2 * 157 * 48 * 4]
    assert "note: the model has 99 rows already: nothing is resized\n" in said("--resize-vocab", 99)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resize-vocab", "98"], r"^--resize-vocab 98 would drop rows: the model has 99; give at least that many"),
        (["--resize-vocab", "3", "--resize-multiple", "33"], r"^--resize-vocab 3 would drop rows: the model has 99;"),
        (["--resize-vocab", "99999999999"], r"^--resize-vocab 99,999,999,999 rows: no more than 16,777,216 are made$"),
        (["--resize-vocab", "0"], r"--resize-vocab: '0' is not an integer above 0"),
        (
            ["--resize-init", "mean"],
            r"^--resize-multiple and --resize-init say how --resize-vocab N does it: give that",
        ),
        (["--resize-vocab", "130", "--resize-init", "ones"], r"invalid choice: 'ones'"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_refusals(words: list[str], message: str, dry: bool, hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(["convert", "from-hf", str(hub / "hub"), str(tmp_path / "out"), *words, *(["--dry-run"] if dry else [])])
    assert list(tmp_path.iterdir()) == []


def test_it_goes_on_where_it_stopped_and_not_with_other_rows(hub: Path, tmp_path: Path) -> None:
    words = ["convert", "from-hf", str(hub / "hub"), str(tmp_path / "out"), "--shard-size", f"{SHARD}"]
    words += ["--resize-vocab", f"{NEW}"]
    with file_size_limit(45_000):
        assert run(words) == 1
    partial = tmp_path / "out.partial"
    (partial / "checkpoints/latest").mkdir(parents=True)
    assert run(words) == 1  # with all data written
    written = {path.name: path.stat().st_mtime_ns for path in partial.glob("**/*.distcp")}
    assert run([*words, "--resize-init", "normal", "--verify"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / CHECKPOINT).glob("*.distcp")} != written
    shutil.rmtree(tmp_path / "out")
    with file_size_limit(45_000):
        assert run(words) == 1
    (partial / "checkpoints/latest").mkdir(parents=True)
    assert run(words) == 1
    (partial / "checkpoints/latest").rmdir()
    written = {path.name: path.stat().st_mtime_ns for path in partial.glob("**/*.distcp")}
    assert run([*words, "--verify"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / CHECKPOINT).glob("*.distcp")} == written
    convert("from-hf", hub / "hub", tmp_path / "straight", *words[4:])
    for path in (tmp_path / "straight" / CHECKPOINT).glob("*.distcp"):
        assert (tmp_path / "out" / CHECKPOINT / path.name).read_bytes() == path.read_bytes()


def test_a_longer_tokenizer_names_what_makes_room(tmp_path: Path) -> None:
    """Where it is refused, the line says what to run; and then it fits."""
    shape: dict[str, Any] = dict(layers=8, hidden=16, heads=2, kv_heads=1, head_dim=8, ffn=8, experts=2)
    model = build(**shape, vocab=200, rotary_dim=8, rope_theta=1e4, softmax_every=8, alpha=2.0, seed=9)
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    model.save_pretrained(theirs)
    convert("from-hf", theirs, tmp_path / "bare")
    hugging_face_folder(theirs, eos="<end>")
    tokens = load_tokenizer(theirs).vocab_size
    assert tokens > 200
    for words in ([], ["--dry-run"], ["--resize-vocab", f"{tokens - 1}"]):
        with pytest.raises(ValueError, match=rf"has {tokens} tokens, .* rows: .* --resize-vocab {tokens}$"):
            run(["convert", "from-hf", str(theirs), str(out), *words])
    with pytest.raises(ValueError, match=rf"has {tokens} tokens, .* 200 rows: .* --resize-vocab {tokens}$"):
        run(["convert", "to-hf", str(tmp_path / "bare"), str(out), "--tokenizer", str(theirs)])
    data = ["--data.train", "[web]", "--run.folder", str(tmp_path / "run"), "--dry-run"]
    with pytest.raises(ValueError, match=rf"convert from-hf {theirs} OUT --resize-vocab {tokens}, and start from OUT$"):
        run(["pretrain", "--init-from", f"hf:{theirs}", *data])
    with pytest.raises(ValueError, match=rf"by megatron-m1 convert to-hf, then .* OUT --resize-vocab {tokens}, and"):
        run(["pretrain", "--init-from", str(tmp_path / "bare"), "--data.tokenizer", str(theirs), *data])
    convert("from-hf", theirs, out, "--resize-vocab", tokens)
    # The tokenizer is that of the weights, whichever way they are named: what is missing now is the corpus.
    with pytest.raises(ValueError, match=r"^data\.train: web\.bin does not exist"):
        run(["pretrain", "--init-from", str(out), *data])
    with pytest.raises(ValueError, match=r"^data\.tokenizer is empty, and run\.init_from = .*/bare brings none: name"):
        run(["pretrain", "--init-from", str(tmp_path / "bare"), *data])
