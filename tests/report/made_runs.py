"""Run folders with everything that a run may record, and of any length: written, not trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_m1.training.event_file import EventFile

SETTINGS: dict[str, Any] = {
    "preset": "tiny",
    "model": {"num_layers": 8, "mixers": ["lightning"] * 7 + ["softmax"]},
    "optimizer": {"lr": 3e-4, "clip_grad": 1.0},
    "run": {"folder": "."},
}


def write_run(folder: Path, records: Sequence[dict[str, Any]], settings: dict[str, Any] | None = None) -> Path:
    """A run folder with these records and this configuration."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if settings is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def write_checkpoint(folder: Path, step: int, settings: dict[str, Any]) -> None:
    """What the report looks at of a checkpoint: that it is complete, and its configuration."""
    place = folder / "checkpoints" / f"step_{step:08d}"
    place.mkdir(parents=True)
    (place / "metadata.json").write_text("{}")
    (place / "config.yaml").write_text(yaml.safe_dump(settings))


def write_start(folder: Path, step: int) -> None:
    """What a process leaves that begins after ``step``."""
    EventFile(folder / "tensorboard", step, lambda line: None).close()


def long_records(steps: int, *, spike: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Records with every kind of figure: two stages, skipped steps, validations by source, saves."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=steps + 1)
    records: list[dict[str, Any]] = []
    every = max(steps // 20, 1)
    for step in range(1, steps + 1):
        loss = 1.7 + 9 * (1 + 40 * step / steps) ** -0.5 + 0.06 * noise[step]
        record: dict[str, Any] = {
            "step": step,
            "tokens": step * 4096,
            "stage": "short" if step <= 0.6 * steps else "context-128k",
            "loss": 30.0 if step == spike else loss,
            "loss_code": loss - 0.4 + 0.05 * noise[step - 1],
            "loss_prose": loss + 0.3,
            "aux_loss": 1.02 + 0.02 * abs(noise[step]),
            "grad_norm": 0.4 * float(np.exp(0.5 * noise[step])) + 40 * (step % every == 0),
            "grad_norm_lightning": 0.2 + 0.02 * noise[step],
            "grad_norm_softmax": 0.1 + 0.01 * noise[step],
            "grad_norm_experts": 0.3 + 0.03 * noise[step],
            "lr": 3e-4 * min(step / every, 1.0),
            "tokens_per_second": 1.2e6 * (1 + 0.02 * noise[step]),
            "mfu": 0.41 + 0.01 * noise[step],
            "expert_load_max_over_mean": 1.3 + 0.1 * abs(noise[step]),
            "expert_load_max_over_mean_quarter_1": 1.2,
            "expert_load_max_over_mean_quarter_4": 1.5,
            "skipped_steps": step // (3 * every),
            "memory_peak_gib": 61.2,
            "save_seconds": 4.0 if step % every == 1 and step > 1 else 0.0,
        }
        records.append(record)
        if step % every == 0:
            records.append({"step": step, "validation_loss": loss + 0.1, "validation_loss_code": loss - 0.2})
    return records


def write_long_run(folder: Path, steps: int, *, seed: int = 0) -> Path:
    """A run of two stages with two restarts, the second with another learning rate, and five checkpoints kept."""
    every = max(steps // 20, 1)
    before = SETTINGS
    after = SETTINGS | {"optimizer": {"lr": 1e-4, "clip_grad": 1.0}}
    write_run(folder, long_records(steps, spike=steps // 3, seed=seed), after)
    for at in (8, 10, 12, 16, 20):
        write_checkpoint(folder, at * every, before if at <= 12 else after)
    for at in (0, 5, 12):
        write_start(folder, at * every)
    return folder


SPIKE, SPIKE_LOSS = 654_321, 12.0


def write_million(folder: Path) -> Path:
    """A run of a million steps, the loss of one of which is far above the others'."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(1).normal(scale=0.05, size=1_000_001)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 1_000_001):
            loss = SPIKE_LOSS if step == SPIKE else 2 + noise[step]
            file.write(
                f'{{"step": {step}, "tokens": {step}, "loss": {loss:.5f}, "grad_norm": {1 + noise[-step]:.5f}}}\n'
            )
    return folder
