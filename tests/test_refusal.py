"""What a failed write is reported as: the operating system's words, not those of a library that met them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_m1.files import refusal
from tests.checkpoint.checkpoint_runs import file_size_limit


@pytest.mark.parametrize("numbers", [10, 10_000, 100_000])
def test_torchs_writer(tmp_path: Path, numbers: int) -> None:
    """It complains of an offset, or of nothing before it closes, depending on where the disk is full."""
    path = tmp_path / "data"
    with file_size_limit(500), pytest.raises((OSError, RuntimeError)) as caught, path.open("wb") as stream:
        torch.save(torch.zeros(numbers), stream)
    assert refusal(caught.value, tmp_path) == f"File too large ({tmp_path})"


def test_a_reason_that_was_lost_is_asked_for_again(tmp_path: Path) -> None:
    lost = RuntimeError("unexpected pos 64 vs 0\nException raised from ...")
    with file_size_limit(500):
        assert refusal(lost, tmp_path) == f"File too large ({tmp_path})"
    assert refusal(lost, tmp_path) == f"unexpected pos 64 vs 0 ({tmp_path})"
    assert os.listdir(tmp_path) == []


def test_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, open(tmp_path / "missing" / "file", "wb"):
        pass
    assert refusal(caught.value, tmp_path) == f"No such file or directory ({tmp_path}/missing/file)"
