"""What each command imports before it has seen that a path, a flag or a file is wrong: modules are counted.

torch takes seconds to import, megatron-core and transformers more: whoever has mistyped a path does not wait for them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as torch_checkpoint

from megatron_m1.data.tokenizers import train_sentencepiece

HEAVY = {"torch", "megatron", "transformers", "tensorboard", "wandb", "triton", "bokeh"}
MOST_MODULES = 700
"""Of a command that ends with a line about wrong input; torch alone has a thousand."""
CODE = """\
import contextlib, io, json, sys
from megatron_m1 import cli
for command in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.exit_status(lambda: cli.run(command.split()))
        except SystemExit as end:  # argparse's help
            status = end.code
    print(json.dumps([status, out.getvalue(), err.getvalue(), sorted(sys.modules)]))
"""


def run_one_after_another(folder: Path, commands: list[str]) -> list[tuple[int, str, str, list[str]]]:
    """Status, output, standard error and all modules so far of each command, in one process, where a module stays."""
    done = subprocess.run([sys.executable, "-c", CODE, *commands], cwd=folder, capture_output=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def heavy(modules: list[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} & HEAVY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A document, a tokenizer, a file that is no tokenizer, a config with a wrong key, a checkpoint."""
    folder = tmp_path_factory.mktemp("budget")
    (folder / "a.txt").write_text("some text")
    (folder / "wrong.yaml").write_text("train: {max_step: 3}\n")
    train_sentencepiece([f"The quick brown fox {i}.\n" for i in range(300)], folder / "t.model", vocab_size=300)
    checkpoint = folder / "run" / "checkpoints" / "step_00000002"
    torch_checkpoint.save({"layer.weight": torch.ones(3, 5)}, checkpoint_id=checkpoint, no_dist=True)
    (checkpoint / "config.yaml").write_text("preset: tiny\n")
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder / "hub").mkdir()
    (folder / "hub" / "config.json").write_text('{"model_type": "llama"}')
    return folder


WRONG = [
    "tokenize no.jsonl --tokenizer t.model --output o",
    "tokenize a.txt --tokenizer no.model --output o",
    "tokenize a.txt --tokenizer wrong.yaml --output o",
    "tokenize a.txt --tokenizer t.model --train-tokenizer 300 --output o",
    "tokenize wrong.yaml --tokenizer t.model --output o",
    "tokenize a.txt --tokenizer t.model --output o --split 2",
    "tokenize a.txt --tokenizer t.model --output ./",
    "inspect no-run",
    "inspect hub",
    "inspect --config no.yaml",
    "pretrain --config no.yaml",
    "pretrain --config wrong.yaml",
    "pretrain --train.max_step 3",
    "pretrain --train.max_steps 1.5",
    "pretrain --micro-batch-size 2",
    "pretrain --init-from no-run",
    "pretrain --init-from hf:no/hub",
    "pretrain --init-from hub",
    "pretrain --init-from hf:hub",
    "pretrain --data.train [no] --data.tokenizer t.model --run.folder r",
    "pretrain --data.train [no] --data.tokenizer no.model --run.folder r",
    "pretrian",
    "evaluate no-run",
    "evaluate hub",
    "evaluate run --train.max_steps 3",
    "generate no-run --prompt a",
    "generate wrong.yaml --prompt a",
    "report no-run",
    "report run",
    "convert to-hf no-run out",
    "convert to-hf run/checkpoints out",
    "convert from-hf no-folder out",
    "convert from-hf hub out",
    "convert from-hf run out",
]


LIGHT = [
    "--help",
    "pretrain --help",
    "tokenize --help",
    "evaluate --help",
    "report --help",
    "inspect run",
    "inspect run --tensors",
    "inspect --preset m1-456b",
    "translate -- --num-layers 8 --hidden-size 64",
]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_wrong_input_is_seen_before_anything_heavy_is_imported(folder: Path) -> None:
    for command, (status, out, said, modules) in zip(WRONG, run_one_after_another(folder, WRONG), strict=True):
        assert (status, out, said.count("\n")) == (2, "", 1), (command, out, said)
        assert said.startswith("megatron-m1: error: ")
        assert not heavy(modules), command
        assert len(modules) < MOST_MODULES, command


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_needs_no_tensors_imports_nothing_heavy(folder: Path) -> None:
    for command, (status, _, said, modules) in zip(LIGHT, run_one_after_another(folder, LIGHT), strict=True):
        assert (status, said) == (0, ""), command
        assert not heavy(modules), command
        assert len(modules) < MOST_MODULES, command


def test_tokenize_imports_neither_torch_nor_megatron_core_in_any_of_its_processes(folder: Path) -> None:
    """Python itself lists what is imported, in the workers as well."""
    command = ["tokenize", "a.txt", "--tokenizer", "t.model", "--output", "out", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_m1.cli", *command],
        cwd=folder,
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert imported.count("megatron_m1.data.tokenize.encode") > 1, "the workers' imports are listed"
    assert {name.partition(".")[0] for name in imported} & HEAVY == set()
    assert "out: 1 document," in done.stdout
