"""``megatron-m1 plan``: what it prints, what it refuses and how."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_m1 import cli
from megatron_m1.commands import plan
from megatron_m1.plan.memory import PARTS

CONFIG = "examples/configs/m1-456b.yaml"
ASK = ["plan", "--config", CONFIG, "--gpus", "2048", "--gpu", "h800"]


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    status = cli.run(words)
    return status, capsys.readouterr().out.splitlines()


def test_the_plan_of_m1(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = printed(ASK, capsys)
    assert status == 0
    text = "\n".join(lines)
    assert "2,048 H800: PP 8 x DP 32 x CP 1 x TP 8, PP 8 x EDP 8 x EP 32 x ETP 1" in text
    heads = [line.split("  ")[0] for line in lines]
    for row in ("GiB of a rank", "parameters", "lightning states", "all", "GFLOPs of a token", "experts", "EP", "TP"):
        assert row in heads
    assert "micro-batches under way        8        7        6        5        4        3        2        1" in lines
    for start in ("step time", "bubble", "tokens", "MFU", "run         11,408,389,439,488 tokens", "assumed"):
        assert any(line.startswith(start) for line in lines), start
    assert lines[-1].startswith("fits: stage ")


def test_json_has_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = printed([*ASK, "--json"], capsys)
    found = json.loads("\n".join(lines))
    assert status == 0 and found["fits"] and found["smallest_change"] is None
    assert len(found["memory_bytes"]) == len(found["traffic_bytes"]) == 8
    for memory in found["memory_bytes"]:
        assert memory["total"] == sum(memory[part] for part in PARTS)
    for end in found["step"].values():
        assert end["days"] == pytest.approx(679_993 * end["seconds"] / 86400)
        assert end["tokens_per_second"] == pytest.approx(2048 * 8192 / end["seconds"])
    assert found["step"]["fastest"]["mfu"] > found["step"]["slowest"]["mfu"] > 0


def test_a_longer_pack_keeps_the_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    _, lines = printed([*ASK, "--seq", "131072", "--json"], capsys)
    found = json.loads("\n".join(lines))
    assert found["tokens_per_step"] == 2048 * 8192
    assert found["tokens"] == pytest.approx(679_993 * 2048 * 8192, rel=1e-6)


def test_a_refusal_says_why_and_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = printed([*ASK, "--seq", "1048576"], capsys)
    assert status == plan.DOES_NOT_FIT
    assert lines[-1].startswith("does not fit: stage ") and " GiB of 72.0 (H800 has 80), of which " in lines[-1]
    change = lines[-1].rpartition("smallest change that fits: ")[2].split()
    fixed = [f"--{change[0]}", change[1]]
    status, lines = printed([*ASK, "--seq", "1048576", *fixed], capsys)
    assert status == 0 and lines[-1].startswith("fits")


def test_a_refusal_that_nothing_helps(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = printed(["plan", "--preset", "m1-456b", "--gpus", "1", "--gpu", "h100"], capsys)
    assert status == plan.DOES_NOT_FIT
    assert lines[-1].endswith("no choice of recomputation, size of the mesh or both of them fits: take more GPUs")


def test_a_users_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("gpus: {H800: {memory_gib: 10}}")
    status, lines = printed([*ASK, "--hardware", str(file)], capsys)
    assert status == plan.DOES_NOT_FIT and "(H800 has 10)" in lines[-1]


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_it_fits_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "terminal_columns", lambda: columns)
    _, lines = printed(ASK, capsys)
    # A source's address is a word that no line breaks.
    assert all(len(line) <= columns or "http" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "2048"], "the following arguments are required: --gpu"),
        (["--gpu", "h800"], "the following arguments are required: --gpus"),
        (["--gpus", "0", "--gpu", "h800"], "'0' is not an integer above 0"),
        (["--gpus", "8", "--gpu", "h900"], "nothing is known of a GPU 'h900': choose from H800, H100"),
        (["--gpus", "8", "--gpu", "a800"], "nothing says memory_gib"),
        (["--gpus", "3", "--gpu", "h800", "--parallel.tensor_model_parallel_size", "2"], "does not divide the world"),
        (["--gpus", "8", "--gpu", "h800", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--gpus", "8", "--gpu", "h800", "--gpuz", "h800"], "unknown option --gpuz: did you mean --gpu?"),
        (["--gpus", "8", "--gpu", "h800", "--seq", "many"], "'many' is not an integer above 0"),
        (["--gpus", "8", "--gpu", "h800", "--seq", "64", "--parallel.context_parallel_size", "0"], "must be a finite"),
        (["--gpus", "8", "--gpu", "h800", "--hardware", "nowhere.yaml"], "--hardware nowhere.yaml can't be read"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_status(lambda: cli.run(["plan", "--preset", "tiny", *words])) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from megatron_m1.cli import run; "
        "run(['plan', '--preset', 'tiny', '--gpus', '8', '--gpu', 'h100']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "False"


RECIPE = ["plan", "--config", "examples/configs/m1-long-context.yaml", "--gpus", "2048", "--gpu", "h800"]


def test_a_stage_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    """It is planned with what it inherits, and with its own tokens."""
    status, lines = printed([*RECIPE, "--stage", "1m"], capsys)
    text = "\n".join(lines)
    assert status == 0
    assert "packs of 1,048,576 tokens" in text and "x CP 32 x" in text
    assert any(line.startswith("run         20,8") for line in lines)


def test_a_batch_that_grows_is_planned_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config", "examples/configs/text-01-pretrain.yaml", "--gpus", "2048", "--gpu", "h800"]
    status, lines = printed([*words, "--stage", "pre-training"], capsys)
    assert status == 0 and any("16,384 packs of 8,192 tokens" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (RECIPE, r"has the stages 32k, 32k-qa, .*: plan one of them with --stage NAME"),
        ([*RECIPE, "--stage", "2m"], r"has the stages 32k, 32k-qa, "),
        ([*ASK, "--stage", "2m"], "has no stages: leave --stage out"),
    ],
)
def test_stages_that_are_not_there(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.run(words[1:])
