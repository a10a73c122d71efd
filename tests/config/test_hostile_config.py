"""Configurations that are made to break their reader: one short line, at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_m1 import cli
from megatron_m1.config.io import load_config, parse_config
from megatron_m1.printing import LONGEST_MESSAGE, cut, shown


def laughs(depth: int) -> str:
    """A list of ten lists of ten lists: 10 ** depth texts when it is spelt."""
    lists = ["&l0 [x, x, x, x, x, x, x, x, x, x]"]
    lists += [f"&l{level} [{', '.join([f'*l{level - 1}'] * 10)}]" for level in range(1, depth)]
    return f"[{', '.join(lists)}]"


HEX = "0x" + "f" * 6000
ODD = {
    "date": ("train: {max_steps: 2001-99-99}", "line 1, column 20: '2001-99-99' is no timestamp"),
    "digits": (f"train: {{max_steps: {'9' * 5000}}}", "99...99"),
    "bits": (f"train: {{max_steps: {HEX}}}", "train.max_steps = a number of 24,000 bits is too large"),
    "negative": ("train: {max_steps: -9223372036854775808}", "train.max_steps = -9223372036854775808 is too large"),
    "list as key": ("? [a]\n: b", "line 1, column 3: this is no name of a field"),
    "mapping as key": ("? {a: 1}\n: b", "this is no name of a field"),
    "merge": ("train: {<<: {max_steps: 1}}", "this is no name of a field"),
    "empty integer": ('train: {max_steps: !!int ""}', "'' is no int"),
    "empty float": ('train: {max_steps: !!float ""}', "'' is no float"),
    "no boolean": ("train: {max_steps: !!bool x}", "'x' is no bool"),
    "no time": ("train: {max_steps: !!timestamp x}", "'x' is no timestamp"),
    "no mapping": ("train: !!map [a]", "expected a mapping node"),
    "object": ("train: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    "laughs": (laughs(10), "the top level must hold groups as 'name: value', not [['x', 'x'"),
    "laughs in a group": (f"train: {laughs(10)}", "train must hold fields as 'name: value', not [['x', 'x'"),
    "laughs in a field": (f"train: {{max_steps: {laughs(10)}}}", "is not an integer"),
    "laughs in a list": (f"data: {{train: {laughs(10)}}}", "is not a list such as"),
    "itself": ("data: {train: &a [*a]}", "is not a list such as"),
    "deep": ("[" * 3000, "nested too deeply"),
    "deep text": (f"train: {{max_steps: '{'[' * 3000}'}}", "is not an integer"),
    "tag in a text": ("train: {max_steps: '!!int \"\"'}", "train.max_steps = '!!int \"\"' is not an integer"),
    "date in a text": ("train: {max_steps: '2001-99-99'}", "train.max_steps = '2001-99-99' is not an integer"),
    "zero byte": ("train: a\0b", "a character that YAML does not allow"),
    "no UTF-8": ("train: \udcff", "not UTF-8 text"),
    "long key": (f"? {'a' * 1_000_000}\n: 1", "aaaa...: --help"),
    "number as key": (f"? {HEX}\n: 1", "unknown key a number of 24,000 bits"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_yaml_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = ODD[name]
    file = tmp_path / "odd.yaml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert cli.exit_status(lambda: cli.run(["inspect", "--config", str(file)])) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and len(err) < LONGEST_MESSAGE + 100
    assert err.startswith("megatron-m1: error: ") and message in err


@pytest.mark.parametrize("text", ["2001-99-99", '!!int ""', "[x", "[" * 3000, "{a: 1", "5"])
def test_a_text_is_taken_as_it_is(text: str) -> None:
    """Where text is asked for, nobody looks for YAML in it."""
    config = parse_config([], ["--data.tokenizer", text, "--run.init_from", text, "--data.train", f"a,{text}"])
    assert (config.data.tokenizer, config.run.init_from, config.data.train) == (text, text, ["a", text])


def test_a_path_that_looks_like_a_date(tmp_path: Path) -> None:
    (tmp_path / "dates.yaml").write_text("data: {train: [0.5, 2001-01-01, 0.5, 7]}")
    assert parse_config([tmp_path / "dates.yaml"], []).data.train == ["0.5", "2001-01-01", "0.5", "7"]


def test_a_pipe_on_the_command_line_is_read_and_one_in_a_folder_is_not(tmp_path: Path) -> None:
    pipe = tmp_path / "config.yaml"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match=r"config.yaml can't be read: no regular file$"):
        load_config(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("train: {max_steps: 7}",))
    writer.start()
    assert parse_config([pipe], []).train.max_steps == 7
    writer.join()


def test_process_substitution(tmp_path: Path) -> None:
    command = f"{sys.executable} -m megatron_m1.cli inspect --config <(echo 'model: {{num_layers: 16}}')"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and "16 layers" in done.stdout


def test_values_are_spelt_at_a_bounded_length() -> None:
    assert [shown(value) for value in ("a", 5, None, 2.5, [1, "b"])] == ["'a'", "5", "None", "2.5", "[1, 'b']"]
    assert shown(1 << 20_000) == "a number of 20,001 bits"
    assert len(shown("x" * 10_000)) == 120
    assert cut("a\n  b") == "a b"
    assert len(cut("x" * 10_000_000)) == LONGEST_MESSAGE + len(" ... ")
