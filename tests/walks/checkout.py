"""A fresh checkout in which somebody types what the pages say."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_m1 import cli
from tests.harness.terminal import Terminal

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ".venv/bin/megatron-m1"
LAUNCHERS = ("RANK", "WORLD_SIZE", "NNODES", "NODE_RANK", "GPUS_PER_NODE", "SLURM_NNODES", "MASTER_PORT", "COLUMNS")
Result = tuple[int, str, str]


def commands_of(page: Path) -> list[list[str]]:
    """Words of every command in a page's bash blocks, comments and the dots for "and so on" left out."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if word != "..."]
            if words:
                found.append(words)
    return found


class Checkout:
    """What is committed, with the installed packages as its ``.venv``.

    Args:
        folder: made here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, listed.stdout.split("\0")):
            # What the work in progress has removed is in the list until it is committed.
            if (ROOT / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
        (folder / ".venv").symlink_to(sys.prefix)

    def command(self, page: str, *words: str) -> list[str]:
        """The one command of a page that has all these words, one after another, as its own words after the program.

        Raises:
            AssertionError: there is none, or another one as well.
        """
        own = [line[1:] for line in commands_of(self.folder / page) if Path(line[0]).name == "megatron-m1"]
        wanted = list(words)
        (found,) = [line for line in own if any(line[at : at + len(wanted)] == wanted for at in range(len(line)))]
        return found

    def environ(self, **more: str) -> dict[str, str]:
        """Of a shell on a machine without GPUs, outside of any launcher."""
        mine = {k: v for k, v in os.environ.items() if k not in LAUNCHERS and not k.startswith("WANDB_")}
        return mine | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more

    def terminal(self, *words: object, columns: int) -> Terminal:
        """The console command in a terminal."""
        texts = [PROGRAM, *map(str, words)]
        return Terminal(texts, columns=columns, environ=self.environ(), cwd=self.folder)


class Shell:
    """The console command in this process, in a checkout: no second import of what is there."""

    def __init__(self, checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
        self.checkout = checkout
        self._capsys = capsys

    def __call__(self, *words: object) -> Result:
        """Run it: status, stdout, stderr."""
        with contextlib.chdir(self.checkout.folder), pytest.MonkeyPatch.context() as patch:
            for name in LAUNCHERS:
                patch.delenv(name, raising=False)
            status = cli.exit_status(lambda: cli.run([str(word) for word in words]))
        out, err = self._capsys.readouterr()
        return status, out, err

    def says(self, *words: object) -> str:
        """What a command prints that succeeds without a word on stderr."""
        status, out, err = self(*words)
        assert (status, err) == (0, ""), (words, err)
        return out

    def refuses(self, *words: object, said: str) -> None:
        """A command ends with status 2, one line on stderr that has ``said``, and nothing else."""
        status, out, err = self(*words)
        assert (status, out) == (2, ""), (words, out, err)
        assert err.startswith("megatron-m1: error: ") and err.count("\n") == 1, (words, err)
        assert said in err, (words, err)


def flags_of(**groups: dict[str, object]) -> list[str]:
    """Dotted flags, such as ``flags_of(train={"max_steps": 3})``."""
    return [
        word
        for group, fields in groups.items()
        for name, value in fields.items()
        for word in (f"--{group}.{name}", str(value))
    ]


SMALL_MODEL: dict[str, object] = dict(
    num_layers=2,
    mixers="[lightning, softmax]",
    hidden_size=32,
    num_attention_heads=2,
    kv_channels=16,
    num_query_groups=2,
    moe_ffn_hidden_size=24,
    num_moe_experts=4,
    vocab_size=384,
)
"""Seconds for what takes minutes in the pages."""
ONE_PROCESS: dict[str, object] = dict(expert_model_parallel_size=1)
OWN_DATA: dict[str, object] = dict(
    train="[corpora/own]",
    validation="[corpora/own_validation]",
    tokenizer="tokenizers/own.model",
    embedded_corpus="none",
    seq_length=64,
)
