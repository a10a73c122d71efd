"""A researcher with a Hugging Face folder: in, a larger vocabulary, some steps more, out, and Python all along.

The commands are README's own, with this walk's folders in the place of the ones that are named there.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_m1 import cli
from tests.convert.folders import convert
from tests.reference.transformers_minimax import build
from tests.walks import readme

pytestmark = pytest.mark.slow

ROWS, TOKENS, MORE_TOKENS = 400, 384, 420
BIN = Path(sys.executable).parent
SETTINGS = """\
preset: tiny
data: {train: [web], validation: [web_validation], seq_length: 64}
optimizer: {lr: 1.0e-3, lr_warmup_tokens: 256}
train: {max_steps: 2, global_batch_size: 2, eval_samples: 2}
run: {save_interval: 0, tensorboard: false}
"""
PYTHON = """\
import json
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

{readme}

ids = model.tokenizer.encode("def main(): pass")
tokenizer = AutoTokenizer.from_pretrained("native")
theirs = AutoModelForCausalLM.from_pretrained("native", dtype=torch.float32).eval()
assert tokenizer("def main(): pass").input_ids == ids
with torch.no_grad():
    right = theirs(torch.tensor([ids]), use_cache=False).logits[0]
ours = model.logits("def main(): pass")
print(json.dumps({{
    "rows": list(ours.shape),
    "error": float((ours - right).abs().max() / right.abs().max()),
    "same": torch.equal(megatron_m1.load("native").logits(ids), ours),
    "loss": float(model.loss(megatron_m1.packed_data("moved/run", split="validation"))),
    "group": torch.distributed.is_initialized(),
}}))
"""


@dataclass(frozen=True)
class Desk:
    """A folder to work in, and what README's commands mean there."""

    folder: Path
    names: dict[str, str]

    def run(self, *words: str, status: int = 0) -> str:
        """Run a command there; both of its streams. No fault may be a traceback.

        What is refused, what trains, and programs are processes of their own; for the rest the command's function is
        called, which spares the imports.
        """
        words = tuple(self.names.get(word, word) for word in words)
        if words[0] == "megatron-m1" and "--nproc-per-node" not in words and not status:
            with io.StringIO() as said, chdir(self.folder), redirect_stdout(said), redirect_stderr(said):
                assert cli.run(words[1:]) == 0, said.getvalue()
                return said.getvalue()
        environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            words, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == status, done.stdout
        assert "Traceback" not in done.stdout
        return done.stdout


def command(*start: str) -> list[str]:
    """README's command that begins like this, up to an ellipsis."""
    (found,) = (
        words for words in readme.commands("Hugging Face in and out") if words[1 : 1 + len(start)] == list(start)
    )
    return [word for word in found if word != "..."]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A folder in the released format with its tokenizer, one whose tokenizer has grown, and some text."""
    folder = tmp_path_factory.mktemp("desk")
    shape = dict(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=24, experts=2, vocab=ROWS)
    model = build(**shape, rotary_dim=16, rope_theta=1e4, softmax_every=2, alpha=1.7, seed=3)
    model.save_pretrained(folder / "saved")
    text = Tokenizer(models.BPE())
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=["<eod>"], initial_alphabet=alphabet)
    source = inspect.getsource(inspect)
    text.train_from_iterator([source], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text, eos_token="<eod>")
    tokenizer.save_pretrained(folder / "saved")
    convert("from-hf", folder / "saved", folder / "first")
    convert("to-hf", folder / "first", folder / "hub")
    shutil.copytree(folder / "hub", folder / "grown")
    tokenizer.add_tokens([f"<new{number}>" for number in range(MORE_TOKENS - TOKENS)])
    tokenizer.save_pretrained(folder / "grown")
    documents = [{"text": part} for part in source[:60_000].split("\n\n")]
    (folder / "web.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in documents))
    (folder / "run.yaml").write_text(SETTINGS)
    names = {"MiniMax-M1-80k": "grown", "hf:MiniMax-M1-80k": "hf:hub", "runs/mid": "run", "hf/mid": "out"}
    return Desk(folder, names)


def test_a_longer_tokenizer_names_its_cure(desk: Desk) -> None:
    whole = command("convert", "from-hf")
    cure = f"--resize-vocab {MORE_TOKENS}"
    refused = desk.run(*whole, status=2)
    assert f"has {MORE_TOKENS} tokens, the model's embedding {ROWS} rows" in refused
    assert cure in refused
    desk.run("megatron-m1", "tokenize", "web.jsonl", "--tokenizer", "grown", "--split", "0.8,0.2", "--output", "web")
    pretrain = ("megatron-m1", "pretrain", "--config", "run.yaml", "--run.folder", "run")
    assert f"convert from-hf grown OUT {cure}" in desk.run(*pretrain, "--init-from", "hf:grown", "--dry-run", status=2)
    assert "to start a run from it give hf:grown" in desk.run(*pretrain, "--init-from", "grown", status=2)
    assert "or hf:FOLDER" in desk.run(*pretrain, "--init-from", "org/name", status=2)
    assert "hf download org/name --local-dir" in desk.run(*pretrain, "--init-from", "hf:org/name", status=2)
    assert not (desk.folder / "run").exists()

    resized = (*whole, *cure.split(), "--resize-multiple", "128")
    assert "would write" in desk.run(*resized, "--dry-run")
    assert not (desk.folder / "imported").exists()
    assert "embedding and head have 512 rows, 112 of them new" in desk.run(*resized)


def test_on_from_there_and_out_again(desk: Desk) -> None:
    from_checkpoint = [each for each in readme.commands("Hugging Face in and out") if "imported" in each][1]
    pretrain = [word for word in from_checkpoint if word != "..."]
    said = desk.run(*pretrain, "--config", "run.yaml", "--run.folder", "run", "--nproc-per-node", "1")
    assert "starting from the weights of imported/checkpoints/step_00000000" in said
    assert (desk.folder / "run" / "tokenizer" / "tokenizer.json").read_bytes() == (
        desk.folder / "grown" / "tokenizer.json"
    ).read_bytes()
    (desk.folder / "moved").mkdir()
    (desk.folder / "run").rename(desk.folder / "moved" / "run")
    desk.names["runs/mid"] = "moved/run"
    assert "prompt" not in desk.run(*command("generate"), "--max-tokens", "4")

    assert "0.2 to 2.4%" in desk.run(*command("convert", "to-hf"), "--license", "apache-2.0")
    desk.run("megatron-m1", "convert", "to-hf", "moved/run", "native", "--format", "native")
    card = (desk.folder / "out" / "README.md").read_text()
    for fact in ("license: apache-2.0", "256 tokens in 2 steps", "`web`: 100.0%", "512 rows", "bfloat16", "vLLM"):
        assert fact in card, fact


def test_and_python_all_along(desk: Desk) -> None:
    (block,) = readme.blocks("From Python", "python")
    script = PYTHON.format(readme=block.replace("runs/tiny", "moved/run"))
    (desk.folder / "notebook.py").write_text(script)
    found = json.loads(desk.run(sys.executable, "notebook.py").splitlines()[-1])
    summary = json.loads((desk.folder / "moved" / "run" / "summary.json").read_text())
    assert found["rows"][1] == 512
    assert found["error"] < 1e-4
    assert found["same"]
    assert not found["group"]
    assert found["loss"] == pytest.approx(summary["validation_loss"], rel=1e-5)


def test_wrong_turns_are_answered_in_one_line(desk: Desk) -> None:
    assert desk.run("megatron-m1", "--version").startswith("megatron-m1 ")
    neither = desk.run("megatron-m1", "convert", status=2)
    assert "to-hf" in neither
    assert "from-hf" in neither
    for words, answer in {
        ("convert", "to-hf", "hub", "x"): "hub is a Hugging Face folder",
        ("convert", "from-hf", "moved/run", "x"): "give --init-from moved/run, to make a Hugging Face folder",
        ("convert", "from-hf", "hub", "imported"): "imported exists",
        ("inspect", "hub"): "megatron-m1 convert from-hf hub OUT, and inspect OUT",
        ("generate", "hub", "--prompt", ""): "prompt '' has no token",
    }.items():
        said = desk.run("megatron-m1", *words, status=2)
        assert answer in said
        assert len(said.splitlines()) == 1
