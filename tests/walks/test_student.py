"""A student on a laptop without a GPU walks through README from a fresh checkout, in 80 and in 200 columns."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_m1.launch import SECOND_INTERRUPT
from tests.harness.terminal import Screen
from tests.training.loop_runs import state_of, steps_recorded
from tests.walks.checkout import ONE_PROCESS, OWN_DATA, PROGRAM, SMALL_MODEL, Checkout, Shell, flags_of

SMALL = flags_of(
    model=SMALL_MODEL,
    parallel=ONE_PROCESS,
    data=OWN_DATA,
    optimizer={"lr_warmup_tokens": 1024, "lr_decay_tokens": 4096},
    train={"global_batch_size": 4, "eval_samples": 2},
    run={"save_interval": 3},
)
BAR = "━"
ENDLESS = flags_of(train={"max_steps": 100_000}, run={"save_interval": 0})


def own_texts_are_tokenised(shell: Shell, own_texts: Path) -> None:
    """What is wrong is said first; then a folder of all kinds, with a held-out part and a new tokenizer."""
    (own_texts.parent / "other.jsonl").write_text('{"content": "x", "id": 1}\n')
    (own_texts.parent / "nothing").mkdir()
    for words, said in (
        ("no-such --tokenizer tokenizers/own.model", "no-such does not exist"),
        ("nothing --tokenizer t.model", "nothing holds no document files"),
        ("texts/picture.png --tokenizer t.model", "--suffix .png takes it as text"),
        ("texts --tokenizer t.model", "tokenizer t.model does not exist"),
        ("texts --tokenizer nothing", "nothing holds no tokenizer files"),
        ("texts --tokenizer texts/web.jsonl", "is no .model file"),
        ("texts --tokenizer", "--tokenizer: expected one argument"),
        ("texts --tokenizer t.model --train-tokenizer many", "'many' is not an integer"),
        ("texts --tokenizer /proc/t.model --train-tokenizer 300", "/proc/t.model can't be written"),
        ("texts --tokenizer folder --train-tokenizer 300", "must end in .model"),
        ("texts --tokenizer t.model --split 0.9", "give the shares"),
    ):
        shell.refuses("tokenize", *words.split(), "--output", "corpora/own", said=said)
    for place, said in (("texts/web.jsonl/own", "Not a directory"), ("/proc/own", "/proc/own can't be written")):
        train = ["--tokenizer", "t.model", "--train-tokenizer", "300"]
        shell.refuses("tokenize", "texts", *train, "--output", place, said=said)
    assert not (own_texts.parent / "t.model").exists()

    train = ["--tokenizer", "tokenizers/own.model", "--train-tokenizer", "384"]
    out = shell.says("tokenize", "texts", *train, "--split", "0.9,0.1", "--output", "corpora/own")
    assert "passed over in texts: 1 .py, 1 .png (--suffix .EXT takes such files as text)" in out
    assert re.search(r"^corpora/own: \d+ documents, [\d,]+ tokens, .*skipped: 1 empty", out, re.MULTILINE)
    assert re.search(r"^corpora/own_validation: \d+ documents, .*held out", out, re.MULTILINE)
    out = shell.says(
        *("tokenize", "texts", "--tokenizer", "tokenizers/own.model", "--suffix", ".py", "--output", "corpora/code")
    )
    assert "passed over in texts: 1 .png (" in out
    own = ["--tokenizer", "tokenizers/own.model", "--output", "corpora/other"]
    shell.refuses("tokenize", "other.jsonl", *own, said='key missing (the first such record has "content", "id")')


def made_by(checkout: Checkout) -> list[str]:
    """The words of the command that ``make pretrain`` ends with, which README begins with."""
    assert "make pretrain " in (checkout.folder / "README.md").read_text().replace("\n", " ")
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "--old-file=install", "pretrain"],
        cwd=checkout.folder,
        env=checkout.environ(),
        capture_output=True,
        text=True,
        check=True,
    )
    program, *words = shlex.split(done.stdout.splitlines()[-1])
    assert program == PROGRAM
    # One process imports once.
    return [*words, "--nproc-per-node", "1"]


def wrong_words_are_answered(shell: Shell, checkout: Checkout) -> None:
    made = made_by(checkout)
    own = flags_of(data={"train": "[corpora/own]", "tokenizer": "tokenizers/own.model"}, parallel=ONE_PROCESS)
    shell.refuses(*made, *own, said="megatron-m1 tokenize --split")
    for words, said in (
        (["--data.train", "[corpora/no]"], "corpora/no.bin does not exist"),
        (["--data.train", "[corpora/own.bin]"], "name the prefix that both share"),
        (["--data.train"], "--data.train needs a value"),
        (["--train.max_steps", "many"], "'many' is not an integer"),
        (["--train.max_steps", "0"], "above 0"),
        (["--train.max_stepz", "1"], "did you mean --train.max_steps?"),
        (["--run.folder", "/proc/run"], "run.folder = /proc/run can't be written"),
        (["--run.folder", "README.md"], "README.md can't be written"),
        (["--config", "no.yaml"], "config file no.yaml can't be read"),
        (["--nproc-per-node", "none"], "'none' is not an integer"),
        (["--data.tokenizer", "README.md"], "README.md"),
    ):
        shell.refuses(*made, *SMALL, *words, said=said)
    shell.refuses("pretrain", "--run.folder", "runs/tinny", said="runs/tinny does not exist, and data.train is empty")
    shell.refuses("pretrain", "--run.folder", "texts", said="texts has no run to go on with")
    shell.refuses("pretrain", "--preset", "tinny", said="choose one of tiny, m1-mid, m1-456b")
    shell.refuses("inspect", "README.md", said="README.md is a file: give a checkpoint or a run folder")
    shell.refuses("inspect", "runs/tinny", said="runs/tinny does not exist")
    shell.refuses("generate", "runs/tinny", "--prompt", "x", said="runs/tinny does not exist")
    shell.refuses("generate", "texts", "--prompt", "x", said="no complete one below checkpoints/")
    assert not (checkout.folder / "runs").exists()


def lines_fit(screen: Screen) -> None:
    """Nothing goes on in a second line but a path, which stays whole so that it can be copied; the cursor is there."""
    begun = [next(at for at in range(row, -1, -1) if at not in screen.wrapped) for row in screen.wrapped]
    assert all(screen.lines[at].startswith(("tensorboard ", "generate ")) for at in begun), screen.lines
    assert screen.cursor_is_shown


def the_first_run_ends_at_ctrl_c_in_80_columns(checkout: Checkout) -> None:
    run = checkout.terminal(*made_by(checkout), *SMALL, *ENDLESS, columns=80)
    folder = checkout.folder / "runs" / "tiny"
    try:
        run.wait_for(lambda: steps_recorded(folder) > 2)
        run.press_ctrl_c()
        assert run.ends() == 0, run.raw()
        screen = run.screen()
    finally:
        run.close()
    lines_fit(screen)
    text = "\n".join(line.rstrip() for line in screen.lines)
    assert re.search(r"^(\^C)?SIGINT: finishing .*, then saving$", text, re.MULTILINE)
    (step,) = re.findall(r"^SIGINT: saving step (\d+), then leaving$", text, re.MULTILINE)
    assert f"checkpoint  runs/tiny/checkpoints/step_{int(step):08}" in text
    assert json.loads((folder / "summary.json").read_text())["interrupted"] == "SIGINT"


def it_goes_on_in_200_columns(checkout: Checkout, shell: Shell) -> None:
    """README's own command; then there is nothing left, and nothing is written."""
    words = checkout.command("README.md", "--run.folder", "runs/tiny", "--train.max_steps")
    folder = checkout.folder / "runs" / "tiny"
    last = steps_recorded(folder) + 2
    words[words.index("--train.max_steps") + 1] = str(last)
    run = checkout.terminal(*words, columns=200)
    try:
        assert run.ends() == 0, run.raw()
        screen = run.screen()
    finally:
        run.close()
    lines_fit(screen)
    text = "\n".join(line.rstrip() for line in screen.lines)
    assert "runs/tiny goes on with its own configuration" in text
    assert f"resumed from step {last - 2} " in text
    assert len(re.findall(r"^step +\d+/\d+ \| tokens .* \| load [\d.]+ \| memory ", text, re.MULTILINE)) == 2
    assert re.search(r"validation loss +│ [\d.]+ nat/token", text)
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [
        *range(1, last + 1),
        last,
    ]
    before = state_of(folder)
    assert shell.says(*words).startswith(f"nothing to train: the run is at step {last}, train.max_steps is {last};")
    assert state_of(folder) == before


def the_run_holds_what_readme_says(checkout: Checkout, shell: Shell) -> None:
    """``inspect`` and ``generate`` as README has them."""
    assert "which became:" in shell.says(*checkout.command("README.md", "inspect", "runs/tiny"))
    preset = shell.says(*checkout.command("README.md", "inspect", "--preset"))
    assert re.search(r"456,089,655,296", preset)
    words = checkout.command("README.md", "generate", "runs/tiny")
    out = shell.says(*words, "--max-tokens", 4)
    assert out.startswith("The module")
    shell.refuses(*words, "--max-tokens", 0, said="'0' is not an integer above 0")
    shell.refuses(*words, "--top-p", 3, said="top_p = 3.0")
    evaluated = shell.says(*checkout.command("README.md", "evaluate", "runs/tiny"))
    summary = json.loads((checkout.folder / "runs" / "tiny" / "summary.json").read_text())
    (loss,) = re.findall(r"^all +[\d,]+ +([\d.]+)", evaluated, re.MULTILINE)
    assert float(loss) == pytest.approx(summary["validation_loss"], abs=1e-4)
    assert "report.html" in shell.says(*checkout.command("README.md", "report", "runs/tiny"))
    for name in re.findall(r"`([\w.]+)`", (checkout.folder / "README.md").read_text().split("holds the run:")[1][:300]):
        assert (checkout.folder / "runs" / "tiny" / name).exists(), name


def the_recipe_is_a_table(checkout: Checkout, shell: Shell) -> None:
    """Every stage has a row, whatever is built first."""
    out = shell.says(*checkout.command("README.md", "--nproc-per-node", "2", "--dry-run"))
    for name in ("pre-training", "continued", "context-256", "context-2048", "fine-tuning"):
        assert re.search(rf"\b{name}\b", out), name


def it_goes_on_elsewhere_until_two_ctrl_cs(checkout: Checkout, shell: Shell, tmp_path: Path) -> None:
    """It goes on from another directory; the second Ctrl-C leaves the terminal as it was, and every checkpoint."""
    moved = tmp_path / "elsewhere"
    shutil.move(checkout.folder / "runs" / "tiny", moved)
    shutil.rmtree(checkout.folder / "tokenizers")
    assert shell.says("generate", moved, "--prompt", "squirrels", "--max-tokens", 2).startswith("squirrels")
    saved = sorted((moved / "checkpoints").iterdir())
    # A step takes its time, so that both keys are pressed in it.
    run = checkout.terminal("pretrain", "--run.folder", moved, *ENDLESS, "--train.global_batch_size", 1024, columns=80)
    try:
        run.wait_for(lambda: BAR in run.raw())
        run.press_ctrl_c()
        run.wait_for(lambda: "SIGINT: finishing" in run.raw())
        while SECOND_INTERRUPT not in run.raw() and run.process.poll() is None:
            time.sleep(0.05)
            run.press_ctrl_c()
        # A shell reports it as 130.
        assert run.ends() == -signal.SIGINT, run.raw()
        screen = run.screen()
    finally:
        run.close()
    assert screen.cursor_is_shown
    assert sum(SECOND_INTERRUPT in line for line in screen.lines) == 1
    assert sorted((moved / "checkpoints").iterdir()) == saved


@pytest.mark.slow
def test_the_walk(checkout: Checkout, shell: Shell, own_texts: Path, tmp_path: Path) -> None:
    own_texts_are_tokenised(shell, own_texts)
    wrong_words_are_answered(shell, checkout)
    the_first_run_ends_at_ctrl_c_in_80_columns(checkout)
    it_goes_on_in_200_columns(checkout, shell)
    the_run_holds_what_readme_says(checkout, shell)
    the_recipe_is_a_table(checkout, shell)
    it_goes_on_elsewhere_until_two_ctrl_cs(checkout, shell, tmp_path)
