"""docs/failures.md quotes what the program says: every quoted line is a message of its source, and numbers agree."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_m1 import cli
from megatron_m1.runtime.watchdog import FIRST_STEP_SECONDS, HUNG_EXIT_CODE

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
ROOMS = ("megatron_m1", "parallel", "data")


def messages_of(source: str) -> Iterator[str]:
    """Texts of a program, neighbours joined, with ``<>`` for each value that is put in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "<>" for part in node.values)


def quoted() -> list[str]:
    """Lines that the page says a user sees: what is in one pair of backticks and has a value or several words."""
    spans = [
        " ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
    ]
    lines = [span for span in spans if span.count(" ") >= 2 and not span.startswith(("--", "megatron-m1 inspect", "#"))]
    return [re.sub(r"<[^>]*>", "<>", line) for line in lines if not line.startswith("falling back")]


@pytest.fixture(scope="module")
def messages() -> list[str]:
    texts = [text for room in ROOMS for path in (ROOT / room).rglob("*.py") for text in messages_of(path.read_text())]
    script = (ROOT / "examples" / "pretrain_m1.sbatch").read_text()
    return texts + [re.sub(r"\$\(\(.*?\)\)|\$\w+", "<>", text) for text in re.findall(r'echo "(.*)"', script)]


def test_every_quoted_line_is_said_by_the_program(messages: list[str]) -> None:
    lines = quoted()
    assert len(lines) >= 15
    unsaid = [line for line in lines if not any(line in message for message in messages)]
    assert not unsaid, "\n".join(unsaid)


def test_numbers_of_the_page() -> None:
    assert f"status {HUNG_EXIT_CODE}." in PAGE
    assert f"The first step has {FIRST_STEP_SECONDS:.0f} s more" in PAGE
    tree = (ROOT / "megatron_m1" / "config" / "tree.py").read_text()
    for name, default in (
        *[("distributed_timeout_seconds", "600"), ("max_skipped_steps", "5"), ("spike_factor", "5")],
        *[("spike_window", "128"), ("max_spikes", "10")],
    ):
        assert re.search(rf"    {name}: \w+ = {default}(\.0)?\n", tree)
        assert f"{name}` ({default})" in PAGE
    assert "${MAX_RESTARTS:=3}" in (ROOT / "examples" / "pretrain_m1.sbatch").read_text()


def test_the_command_that_goes_on_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what the sbatch file says before it."""
    config = tmp_path / "run.yaml"
    config.write_text(f"data: {{embedded_corpus: {tmp_path / 'corpus'}}}\n")
    (before,) = re.findall(r"pretrain_m1\.sh (.*) \"\$@\"", (ROOT / "examples" / "pretrain_m1.sbatch").read_text())
    block = PAGE.split("always the same command.", 1)[1].split("```")[1]
    commands = [shlex.split(line, comments=True) for line in block.removeprefix("bash\n").splitlines()]
    assert [words[0] for words in commands] == ["megatron-m1", "sbatch", "sbatch"]
    for words in commands:
        given = before.split() if words[0] == "sbatch" else []
        given += words[words.index("--config") :]
        given = [str(ROOT / word) if word.startswith("examples/") else word for word in given]
        given[given.index("run.yaml")], given[given.index("runs/mid")] = str(config), str(tmp_path / "mid")
        assert cli.run(["pretrain", *given, "--dry-run", "--world-size=1", "--device=gpu"]) == 0
        preset = "m1-mid" if words[0] == "sbatch" else "tiny"
        assert capsys.readouterr().out.startswith(f"plan        preset {preset}, bf16 on gpu over nccl")


def test_the_commands_for_fewer_nodes_are_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = PAGE.split("so ask first:", 1)[1].split("```")[1]
    commands = [
        shlex.split(line, comments=True) for line in block.removeprefix("bash\n").replace("\\\n", "").splitlines()
    ]
    folders = ["--run.folder", str(tmp_path / "run"), "--data.embedded_corpus", str(tmp_path / "corpus")]
    meshes = []
    for words in commands:
        assert words[0] == "megatron-m1"
        words[words.index("--config") + 1] = str(ROOT / words[words.index("--config") + 1])
        # Data of nobody: the embedded corpus stands in for them.
        for flag in ("--data.train", "--data.tokenizer"):
            del words[words.index(flag) : words.index(flag) + 2]
        assert cli.run([*words[1:], *folders]) == 0
        meshes += re.findall(r"tensor \d+ x context .* = \d+", capsys.readouterr().out)
    assert meshes == [
        "tensor 8 x context 1 x pipeline 8 x data 16 = 1024",
        "tensor 8 x context 1 x pipeline 4 x data 16 = 512",
    ]
