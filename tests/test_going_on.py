"""What ``pretrain`` says of a folder that has a run: what has changed, and that nothing is left to train."""

from __future__ import annotations

from pathlib import Path

from tests.test_cli import Run, assert_refused, command, corpus, dry_run, run_folder, tokenizer  # noqa: F401


def test_a_dry_run_says_what_has_changed_since_the_checkpoint(
    command: Run,  # noqa: F811
    run_folder: Path,  # noqa: F811
    corpus: Path,  # noqa: F811
    tokenizer: Path,  # noqa: F811
) -> None:
    plan = dry_run(corpus, tokenizer, "--run.folder", run_folder, "--data.seq_length", 256, "--optimizer.lr", 0.1)
    status, out, _ = command(*plan)
    assert status == 0
    lines = out.splitlines()
    at = lines.index(f"run folder  {run_folder}, goes on from step_00000020")
    assert lines[at - 2] == f"steps       21 to 1,000 = {81_920 + 980 * 8 * 256:,} tokens"
    changed = [line[12:] for line in lines[at + 1 : -1]]
    assert lines[at + 1].startswith("changed     ")
    assert [line for line in changed if "data.seq_length" in line] == ["data.seq_length 512 -> 256"]
    assert [line for line in changed if "optimizer" in line] == ["optimizer.lr 0.0002 -> 0.1"]
    assert changed[-1].startswith("so the data are not the stream that would have come")
    status, out, _ = command(*plan, "--train.max_steps", 20)
    assert status == 0 and "\n            nothing to train: the run is at step 20, train.max_steps is 20;" in out


def test_nothing_to_train_is_one_line_whatever_else_is_wrong(
    command: Run,  # noqa: F811
    run_folder: Path,  # noqa: F811
) -> None:
    """Before the data are looked for, and anything is made."""
    before = sorted(run_folder.rglob("*"))
    flags = ["--preset", "tiny", "--data.train", "nowhere", "--run.folder", run_folder, "--train.max_steps"]
    status, out, err = command("pretrain", *flags, 12)
    assert (status, err, sorted(run_folder.rglob("*"))) == (0, "", before)
    assert out.startswith("nothing to train: the run is at step 20, train.max_steps is 12; ") and out.count("\n") == 1
    assert_refused(command("pretrain", *flags, 20, "--no-resume"), "holds checkpoints and run.resume is false")
    assert_refused(command("pretrain", *flags, 20, "--model.num_layers", 16), "model.num_layers is 16", "has 8")
    data = next((run_folder / "checkpoints" / "step_00000020").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    # A damaged checkpoint is no end.
    assert_refused(command("pretrain", *flags, 20), "data.tokenizer is empty")


def test_corpora_that_are_read_many_times_are_named(
    command: Run,  # noqa: F811
    corpus: Path,  # noqa: F811
    tokenizer: Path,  # noqa: F811
) -> None:
    for packs, times in ((4, "2.29"), (8, "4.57")):
        status, out, _ = command(
            *dry_run(corpus, tokenizer, "--data.seq_length", 4, "--train.global_batch_size", packs),
            *("--train.max_steps", 1, "--train.eval_samples", 0),
        )
        assert status == 0 and f"read {times} times" in out
        assert (f"warning: {corpus} is read 4.6 times in the run: beyond about 4, " in out) == (packs == 8)


def test_a_hugging_face_folder_to_start_from_needs_its_prefix(command: Run, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "config.json").write_text("{}")
    result = command("pretrain", "--init-from", tmp_path, "--dry-run")
    assert_refused(result, f"give hf:{tmp_path}")
