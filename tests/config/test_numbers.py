"""Counts as people write them: in YAML, in flags, and where they are refused."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_m1.commands.options import positive_integer, token_count
from megatron_m1.config.io import parse_config
from tests.config.test_config import message_of

WARMUP = "optimizer.lr_warmup_tokens"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e6", 1_000_000),
        ("1.0e+6", 1_000_000),
        ("2.5e3", 2_500),
        ("65_536", 65_536),
        ("64K", 64_000),
        ("64k", 64_000),
        ("100M", 100_000_000),
        ("1.5B", 1_500_000_000),
        ("2T", 2_000_000_000_000),
        ("2 T", 2_000_000_000_000),
        ("1_500.5M", 1_500_500_000),
        ("10.0", 10),
        ("0", 0),
    ],
)
def test_a_count_of_tokens_is_the_same_in_yaml_and_in_a_flag(text: str, number: int, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"optimizer:\n  lr_warmup_tokens: {text}\n")
    assert parse_config([file], []).optimizer.lr_warmup_tokens == number
    assert parse_config([], [f"--{WARMUP}={text}"]).optimizer.lr_warmup_tokens == number
    assert type(parse_config([file], []).optimizer.lr_warmup_tokens) is int


def test_every_other_count_is_read_so_too() -> None:
    flags = [
        "--data.train_transition_tokens=1M",
        "--train.max_steps",
        "2e3",
        "--train.eval_samples",
        "1K",
        "--run.save_interval=1e2",
    ]
    config = parse_config([], flags)
    assert (config.data.train_transition_tokens, config.train.max_steps) == (1_000_000, 2_000)
    assert (config.train.eval_samples, config.run.save_interval) == (1_000, 100)
    assert parse_config([], ["--train.max_steps=none"]).train.max_steps is None


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        (f"--{WARMUP}=1.5", [f"{WARMUP} = '1.5' is not an integer"]),
        (f"--{WARMUP}=1.2345K", [f"{WARMUP} = '1.2345K' is 1234.5: give a whole number"]),
        (f"--{WARMUP}=1e30", ["is too large"]),
        (f"--{WARMUP}=1e999", ["is too large"]),
        (f"--{WARMUP}=9999999T", ["is too large"]),
        (f"--{WARMUP}=5 tokens", ["'5 tokens' is not an integer"]),
        (f"--{WARMUP}=2KB", ["'2KB' is not an integer"]),
        (f"--{WARMUP}=1e-1", ["'1e-1' is not an integer"]),
        ("--data.seq_length=32K", ["data.seq_length = '32K'", "write 32000 or 32768"]),
        ("--data.seq_length=1M", ["write 1000000 or 1048576"]),
        ("--model.vocab_size=128k", ["model.vocab_size = '128k'", "write 128000 or 131072"]),
        ("--model.hidden_size=0.0001K", ["write it out"]),
    ],
)
def test_what_is_no_count_is_refused_in_one_line(flag: str, parts: list[str]) -> None:
    message = message_of([], [flag])
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("text", ["1.5", "1.5e0", ".inf", "-.inf", ".nan", "1e300"])
def test_a_float_in_yaml_that_is_no_count_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"optimizer:\n  lr_warmup_tokens: {text}\n")
    assert WARMUP in message_of([file], [])


def test_a_seq_length_may_be_written_with_an_exponent() -> None:
    assert parse_config([], ["--data.seq_length=1e3"]).data.seq_length == 1_000


def test_options_of_commands_read_the_same() -> None:
    assert [positive_integer(text) for text in ("7", "1e3", "4_096")] == [7, 1_000, 4_096]
    assert [token_count(text) for text in ("7", "2K", "1.5M")] == [7, 2_000, 1_500_000]
    for text in ("0", "-1", "1.5", "x", "", "2K"):
        with pytest.raises(argparse.ArgumentTypeError):
            positive_integer(text)
    with pytest.raises(argparse.ArgumentTypeError, match=r"^the value = '2K': K may stand for two numbers here"):
        positive_integer("2K")
    for text in ("0", "0K", "1.5", "2 kilo"):
        with pytest.raises(argparse.ArgumentTypeError):
            token_count(text)
