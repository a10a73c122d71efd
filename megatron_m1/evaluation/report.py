"""What was found, as files in a folder and as tables on the console."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_m1.evaluation.pictures import can_draw, curves, draw_needle, draw_perplexity
from megatron_m1.files import read_json_object, refusal, write_atomically
from megatron_m1.printing import table

PERPLEXITY, NEEDLE, TASKS = "perplexity", "needle", "tasks"
EVALUATION = "evaluation"
"""Key of every file of ours: which evaluation it is of."""
NO_PICTURE = "no picture: matplotlib is not installed, pip install 'megatron-m1[eval]'"


def check_files(folder: Path, kinds: Sequence[str]) -> None:
    """Check that nothing but files of evaluations would be replaced.

    Raises:
        ValueError: something else is there.
    """
    for kind in kinds:
        path, picture = folder / f"{kind}.json", folder / f"{kind}.png"
        if os.path.lexists(path):
            if not _is_ours(path, kind):
                raise ValueError(f"{path} is no evaluation of megatron-m1: move it, or give another --output")
        elif os.path.lexists(picture):
            raise ValueError(f"{picture} is no picture of megatron-m1's: move it, or give another --output")


def _is_ours(path: Path, kind: str) -> bool:
    try:
        return path.is_file() and read_json_object(path).get(EVALUATION) == kind
    except (OSError, ValueError):
        return False


def save(folder: Path, kind: str, record: Mapping[str, Any]) -> list[Path]:
    """Write a record as JSON and, where that can be, as a picture.

    Returns:
        The files.

    Raises:
        ValueError: the folder can't be written.
    """
    path = folder / f"{kind}.json"
    content = json.dumps({EVALUATION: kind, **record}, indent=2, allow_nan=False) + "\n"
    files = {path: content.encode()}
    title = Path(record["checkpoint"]).name
    if kind == PERPLEXITY and can_draw():
        files[path.with_suffix(".png")] = draw_perplexity(record, f"{title}: {record['tokens']:,} held-out tokens")
    elif kind == NEEDLE and can_draw():
        files[path.with_suffix(".png")] = draw_needle(record, f"{title}: {record['found']:.0%} of the needles found")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            write_atomically(file, data)
    except OSError as error:
        raise ValueError(f"{folder} can't be written: {refusal(error, folder)}") from error
    return list(files)


def tables(kind: str, record: Mapping[str, Any], columns: int | None) -> list[str]:
    """Lay a record out for the console."""
    if kind == PERPLEXITY:
        return _perplexity_tables(record, columns)
    if kind == NEEDLE:
        return _needle_table(record, columns)
    return _tasks_table(record, columns)


def _perplexity_tables(record: Mapping[str, Any], columns: int | None) -> list[str]:
    rows = [["source", "tokens", "loss", "perplexity"], ["all", *_numbers(record)]]
    rows += [[name, *_numbers(row)] for name, row in record["by_source"].items()]
    shown = table(rows, columns, left=[0])
    for by, source, buckets in curves(record):
        if source:
            continue
        heading = [f"position in the {by}", "tokens", "loss", "perplexity"]
        spans = [
            f"{row['from']:,} to {row['to']:,}" if row["to"] > row["from"] else f"{row['from']:,}" for row in buckets
        ]
        found = [[span, *_numbers(row)] for span, row in zip(spans, buckets, strict=True)]
        shown += ["", *table([heading, *found], columns, left=[0])]
    return shown


def _numbers(row: Mapping[str, Any]) -> list[str]:
    loss, perplexity = row["loss"], row["perplexity"]
    return [
        f"{row['tokens']:,}",
        "" if loss is None else f"{loss:.4f}",
        "" if perplexity is None else f"{perplexity:,.2f}",
    ]


def _needle_table(record: Mapping[str, Any], columns: int | None) -> list[str]:
    rows = [["tokens", "depth", "samples", "found", "tokens right", "loss"]]
    for cell in record["cells"]:
        rows.append(
            [
                f"{cell['length']:,}",
                f"{cell['depth']:.0%}",
                f"{cell['samples']}",
                f"{cell['found']:.0%}",
                f"{cell['tokens_right']:.0%}",
                f"{cell['loss']:.4f}",
            ]
        )
    return table(rows, columns)


def _tasks_table(record: Mapping[str, Any], columns: int | None) -> list[str]:
    rows = [["task", "questions", "metric", "value", "standard error"]]
    for task, found in record["tasks"].items():
        for metric, value in found["metrics"].items():
            error = found["standard_errors"].get(metric)
            rows.append(
                [
                    task,
                    f"{found['questions']:,}",
                    metric,
                    f"{value:.4f}" if isinstance(value, float) else str(value),
                    "" if error is None else f"{error:.4f}",
                ]
            )
    return table(rows, columns, left=[0, 2])
