"""What a run leaves in metrics.jsonl, in TensorBoard and on the console, across interruptions."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_m1.config.tree import RunConfig
from megatron_m1.training import step, trainer
from megatron_m1.training.expert_load import EXPERT_LOAD
from megatron_m1.training.figures import Figure
from megatron_m1.training.metrics import MetricsLog, rewind
from tests.checkpoint.checkpoint_runs import file_size_limit

LOSS, VALIDATION_LOSS = step.LOSS, trainer.VALIDATION_LOSS
RECORD: dict[Figure, float] = {
    trainer.TOKENS: 81920,
    LOSS: 7.25,
    step.AUX_LOSS: 1.0312,
    step.GRAD_NORM: 0.5,
    trainer.LR: 2e-4,
    trainer.TOKENS_PER_SECOND: 3141.0,
    trainer.TFLOPS: 0.0123,
    EXPERT_LOAD: 1.5,
    trainer.SKIPPED_STEPS: 0,
}


def open_log(folder: Path, *, start_step: int = 0, log_interval: int = 1, terminal: bool = False) -> MetricsLog:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    return MetricsLog(
        folder,
        RunConfig(tensorboard=False, log_interval=log_interval),
        start_step=start_step,
        total_steps=20,
        console=console,
    )


def printed(log: MetricsLog) -> str:
    output = log._console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def records(folder: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_starts_are_appended_and_never_rewound(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.log_start({"step": 0})
        for step in range(1, 7):
            log.log_step(step, RECORD)
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"step": 6, "ti')  # killed
    with open_log(tmp_path, start_step=3) as log:
        log.log_start({"step": 3})
        log.go_back(2)
        log.log_start({"step": 4})
    assert [record["step"] for record in records(tmp_path)] == [1, 2]
    assert (tmp_path / "starts.jsonl").read_text() == '{"step": 0}\n{"step": 6, "ti\n{"step": 3}\n{"step": 4}\n'


def test_a_start_on_a_full_disk_comes_with_the_next_step(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.log_start({"step": 0})
        with file_size_limit(13):
            log.log_start({"step": 5})
            log.log_step(6, {})
        assert (tmp_path / "starts.jsonl").read_text() == '{"step": 0}\n'
        log.log_step(7, {})
        assert (tmp_path / "starts.jsonl").read_text() == '{"step": 0}\n{"step": 5}\n'
        said = [line for line in printed(log).splitlines() if "starts.jsonl" in line]
    assert [line.removeprefix(f"{tmp_path}/").split(":")[0] for line in said] == [
        "starts.jsonl can't be written",
        "starts.jsonl is written again",
    ]


def test_one_strict_json_line_per_record(tmp_path: Path) -> None:
    with open_log(tmp_path / "new" / "run") as log:
        log.log_step(1, RECORD)
        # Readers see a record at once, not when the run ends.
        assert records(tmp_path / "new" / "run") == [
            {"step": 1, **{figure.name: value for figure, value in RECORD.items()}}
        ]
        log.log_step(2, {LOSS: math.nan, step.GRAD_NORM: math.inf})
        log.log_validation(2, {VALIDATION_LOSS: 6.5})
    assert records(tmp_path / "new" / "run")[1:] == [
        {"step": 2, "loss": None, "grad_norm": None},
        {"step": 2, "validation_loss": 6.5},
    ]


def test_resume_drops_later_records_and_the_torn_line(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        for number in range(1, 6):
            log.log_step(number, {LOSS: float(number)})
            log.log_validation(number, {VALIDATION_LOSS: 2.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    with open_log(tmp_path, start_step=3) as log:
        log.log_step(4, {LOSS: 40.0})
    assert [record["step"] for record in records(tmp_path)] == [1, 1, 2, 2, 3, 3, 4]
    assert records(tmp_path)[-1]["loss"] == 40.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_complete_record_without_its_newline_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    rewind(path, 9)
    assert path.read_text() == '{"step": 1}\n'


def test_tensorboard_events(tmp_path: Path) -> None:
    def write(start_step: int, steps: range, loss: float) -> None:
        with MetricsLog(
            tmp_path,
            RunConfig(log_interval=50),
            start_step=start_step,
            total_steps=20,
            console=Console(file=io.StringIO()),
        ) as log:
            for number in steps:
                log.log_step(number, {LOSS: loss})
            log.log_validation(steps[-1], {VALIDATION_LOSS: 0.25})

    write(0, range(1, 4), 1.0)
    write(2, range(3, 5), 2.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("validation_loss")] == [(4, 0.25)]


def test_plain_lines(tmp_path: Path) -> None:
    with open_log(tmp_path, log_interval=4) as log:
        for number in range(1, 9):
            log.log_step(number, {**RECORD, trainer.SKIPPED_STEPS: int(number > 4)})
        log.log_step(9, {LOSS: math.nan})
        log.log_validation(9, {VALIDATION_LOSS: 6.54321})
        log.log_step(20, {LOSS: 5.0})
    lines = printed(log).splitlines()
    assert lines[0].startswith(
        "step  4/20 | tokens 81.92K | loss 7.2500 | aux 1.0312 | grad norm 0.500 | lr 2.00e-04 | 3.14K tokens/s | "
        "0.0123 TFLOP/s per device | load 1.50 | 0:00:0"
    )
    assert lines[0].endswith(" left")
    assert [line.split(" | ")[0] for line in lines] == [
        "step  4/20",
        "step  8/20",
        "step  9/20",
        "step  9/20",
        "step 20/20",
    ]
    assert "skipped 1" in lines[1]
    assert "loss nan" in lines[2]
    assert lines[3] == "step  9/20 | validation loss 6.5432"
    assert lines[4] == "step 20/20 | loss 5.0000"
    assert "\x1b" not in printed(log)


def test_status_line_on_a_terminal(tmp_path: Path) -> None:
    with open_log(tmp_path, log_interval=3, terminal=True) as log:
        log.log_step(1, RECORD)
        assert "1/20" in printed(log)
        assert "loss 7.2500" in printed(log)
        assert "step  3/20" not in printed(log)
        log.log_step(3, RECORD)
        assert "step  3/20" in printed(log)


def test_a_line_of_text_is_shown_as_it_is(tmp_path: Path) -> None:
    line = "starting from runs/:smile:/[red]x " + 300 * "y"
    with open_log(tmp_path) as log:
        log.note(line)
    assert printed(log) == f"{line}\n"


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="log_interval is 0"):
        open_log(tmp_path, log_interval=0)


def test_a_run_that_goes_back_has_every_step_once(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    with MetricsLog(tmp_path, RunConfig(), start_step=0, total_steps=9, console=console) as log:
        for number, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)):
            log.log_step(number, {**RECORD, LOSS: loss})
        log.log_validation(2, {VALIDATION_LOSS: 2.5})
        log.go_back(2)
        for number, loss in ((3, 30.0), (4, 40.0)):
            log.log_step(number, {**RECORD, LOSS: loss})
    expected = [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert [(line["step"], line["loss"]) for line in records(tmp_path) if "loss" in line] == expected
    assert [line["step"] for line in records(tmp_path) if "validation_loss" in line] == [2]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected
    assert [event.step for event in events.Scalars("validation_loss")] == [2]
