"""Reading and writing the configuration tree: precedence, types, and errors of one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_m1.config import Config
from megatron_m1.config.fields import field_types, path_fields
from megatron_m1.config.help import tree_help
from megatron_m1.config.io import load_config, parse_config
from megatron_m1.config.presets import PRESETS, preset
from megatron_m1.config.written import config_text, write_config


def message_of(files: list[Path], flags: list[str]) -> str:
    """Return the one line that the wrong input ends in."""
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        parse_config(files, flags)
    return str(caught.value)


def test_flags_win_over_yaml_and_yaml_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: m1-mid\nmodel:\n  num_layers: 24\n  kv_channels: 64\ntrain:\n  max_steps: 7\n")
    config = parse_config([file], ["--model.num_layers", "32", "--train.seed=9"])
    assert config.preset == "m1-mid"
    assert config.model == dataclasses.replace(preset("m1-mid"), num_layers=32, kv_channels=64)
    assert (config.train.max_steps, config.train.seed) == (7, 9)


def test_the_preset_of_the_command_line_wins_over_the_files(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: m1-mid\n")
    config = parse_config([file], [], "m1-456b")
    assert config == Config(preset="m1-456b", model=preset("m1-456b"))


def test_later_files_win(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("train: {max_steps: 1, seed: 2}\n")
    second.write_text("train: {max_steps: 3}\n")
    train = parse_config([first, second], []).train
    assert (train.max_steps, train.seed) == (3, 2)


@pytest.mark.parametrize(
    ("flags", "path", "value"),
    [
        (["--data.train", "[0.7, code, 0.3, prose]"], "data.train", ["0.7", "code", "0.3", "prose"]),
        (["--data.train=one"], "data.train", ["one"]),
        (["--data.train", "[]"], "data.train", []),
        (["--run.resume", "false"], "run.resume", False),
        (["--run.async_save", "--run.folder", "x"], "run.async_save", True),
        (["--model.residual_alpha", "none"], "model.residual_alpha", None),
        (["--optimizer.adam_eps", "1e-15"], "optimizer.adam_eps", 1e-15),
        (["--run.folder", "123"], "run.folder", "123"),
        (
            ["--parallel.pipeline_model_parallel_layout=Et*3|t*5L"],
            "parallel.pipeline_model_parallel_layout",
            "Et*3|t*5L",
        ),
    ],
)
def test_flag_values(flags: list[str], path: str, value: object) -> None:
    group, name = path.split(".")
    assert getattr(getattr(parse_config([], flags), group), name) == value


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--train.maxsteps", "3"], ["--train.maxsteps", "--train.max_steps"]),
        (["--max-steps", "3"], ["--max-steps", "--train.max_steps"]),
        (["--tensor-model-parallel-size", "2"], ["--parallel.tensor_model_parallel_size"]),
        (["--train", "3"], ["--train is a group"]),
        (["--train.max_steps", "ten"], ["train.max_steps = 'ten'", "an integer"]),
        (["--train.max_steps", "1.5"], ["train.max_steps = '1.5'", "an integer"]),
        (["--train.precision", "fp16"], ["train.precision = 'fp16'", "auto, fp32, bf16"]),
        (["--model.residual_alpha", "big"], ["model.residual_alpha = 'big'", "a number or none"]),
        (["--train.max_steps"], ["--train.max_steps needs a value"]),
        (["--train.max_steps", "--train.seed", "3"], ["--train.max_steps needs a value"]),
        (["stray"], ["'stray'"]),
        (["--preset", "huge"], ["'huge'", "tiny, m1-mid, m1-456b"]),
    ],
)
def test_a_wrong_flag_is_one_line(flags: list[str], parts: list[str]) -> None:
    message = message_of([], flags)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "parallel: {tensor_model_paralel_size: 2}",
            ["tensor_model_paralel_size", "parallel.tensor_model_parallel_size"],
        ),
        ("paralel: {}", ["paralel", "did you mean parallel"]),
        ("train: 5", ["train must hold fields", "5"]),
        ("train: {max_steps: abc}", ["train.max_steps = 'abc'"]),
        ("train: {max_steps: true}", ["train.max_steps = True"]),
        ("train: {seed: }", ["train.seed has no value"]),
        ("train: [", ["no valid YAML", "line 1"]),
        ("train:\n  seed: 1\n  seed: 2\n", ["no valid YAML", "line 3", "'seed' is there twice"]),
        ("- a\n- b", ["the top level"]),
        ("preset: 3", ["'3' does not exist"]),
    ],
)
def test_a_wrong_file_is_one_line(text: str, parts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    message = message_of([file], [])
    assert [part for part in parts if part not in message] == [], message


def test_a_wrong_value_is_said_with_its_file(tmp_path: Path) -> None:
    """That of the last file that has it, and none where a flag does."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("train: {max_steps: abc, seed: x}\n")
    second.write_text("train: {max_steps: 7}\n")
    assert message_of([first], []) == f"config file {first}: train.max_steps = 'abc' is not an integer or none"
    assert message_of([first, second], []) == f"config file {first}: train.seed = 'x' is not an integer"
    assert (
        message_of([second, first], ["--train.max_steps=1"])
        == f"config file {first}: train.seed = 'x' is not an integer"
    )
    flags = ["--train.max_steps=1", "--train.seed=y"]
    assert message_of([first], flags) == "train.seed = 'y' is not an integer"


@pytest.mark.parametrize(
    "path", ["train.moe_aux_loss_coeff_schedule", "train.global_batch_size_schedule", "optimizer.clip_grad_schedule"]
)
def test_a_schedule_is_a_list_of_numbers(path: str) -> None:
    assert message_of([], [f"--{path}", "[0,a]"]) == f"{path} = '[0,a]' is not a list of numbers such as [0, 0.01]"


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    assert "none.yaml can't be read: No such file" in message_of([tmp_path / "none.yaml"], [])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    config = parse_config([], ["--optimizer.adam_eps", "1e-15", "--data.train", "[0.7, a, 0.3, b]"], "m1-456b")
    write_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("~", "/home/me"),
        ("~/runs/a", "/home/me/runs/a"),
        ("$SCRATCH/a", "/scratch/a"),
        ("${SCRATCH}x/${NUMBER}", "/scratchx/7"),
        ("~/$NUMBER", "/home/me/7"),
        ("cost$$", "cost$"),
        ("./~", "./~"),
        ("a~b", "a~b"),
        ("runs/a", "runs/a"),
    ],
)
def test_a_path_is_what_a_shell_would_make_of_it(
    given: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HOME": "/home/me", "SCRATCH": "/scratch", "NUMBER": "7"}.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "run.yaml"
    blend = f'[0.7, "{given}", 0.3, other]'
    file.write_text(f'run: {{folder: "{given}"}}\ndata: {{train: {blend}, validation: {blend}}}\n')
    config = parse_config([file], [f"--data.tokenizer={given}", f"--run.init_from=hf:{given}"])
    assert config.run.folder == config.data.tokenizer == meant
    assert config.data.train == config.data.validation == ["0.7", meant, "0.3", "other"]
    assert config.run.init_from == f"hf:{meant}"
    write_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("$NOT_SET/a", "the environment variable NOT_SET is not set"),
        ("~/${NOT_SET}", "the environment variable NOT_SET is not set"),
        ("~no-such-user/a", "there is no user no-such-user"),
        ("a$", "write $$ for a dollar sign"),
        ("$5", "write $$ for a dollar sign"),
        ("${", "write $$ for a dollar sign"),
    ],
)
def test_a_path_that_means_nothing_is_refused(given: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    for path in ("run.folder", "data.cache_folder", "run.init_from"):
        message = message_of([], [f"--{path}={given}"])
        assert message.startswith(f"{path} = {given!r}: ") and part in message
    assert message_of([], [f"--data.train=0.5,{given}"]).startswith(f"data.train = {given!r}: ")


def test_every_field_that_names_files_is_known_as_one() -> None:
    assert path_fields() == {
        *["data.embedded_corpus", "data.train", "data.validation", "data.tokenizer", "data.cache_folder"],
        "data.max_epochs",
        *["run.folder", "run.init_from"],
    }


PERIODS = {1: ["softmax"], 2: ["lightning", "softmax"], 4: ["lightning"] * 3 + ["softmax"]}


@pytest.mark.parametrize("period", PERIODS)
def test_the_older_name_of_the_mixers_is_read(period: int, tmp_path: Path) -> None:
    mixers = PERIODS[period]
    assert parse_config([], ["--model.attention_period", str(period)]).model.mixers == mixers
    assert parse_config([], [f"--model.attention_period={period}"]).model.mixers == mixers
    file = tmp_path / "old.yaml"
    file.write_text(f"model: {{num_layers: 8, attention_period: {period}}}\n")
    assert parse_config([file], []).model.mixers == load_config(file).model.mixers == mixers
    assert parse_config([file], ["--model.mixers", "softmax,lightning"]).model.mixers == ["softmax", "lightning"]


def test_an_older_checkpoint_s_configuration_is_read(tmp_path: Path) -> None:
    """The whole file, as it was written before there were mixers, and written again in today's words."""
    written = config_text(parse_config([], ["--model.num_layers=12"]))
    (new,) = [line for line in written.splitlines(keepends=True) if line.lstrip().startswith("mixers:")]
    (kind,) = [line for line in written.splitlines(keepends=True) if line.lstrip().startswith("ffns:")]
    (residual,) = [line for line in written.splitlines(keepends=True) if line.lstrip().startswith("residual:")]
    old = written.replace(new, "  attention_period: 6\n").replace(kind, "").replace(residual, "")
    (tmp_path / "config.yaml").write_text(old)
    config = load_config(tmp_path / "config.yaml")
    assert config == parse_config([], ["--model.num_layers=12", "--model.attention_period=6"])
    assert (config.model.ffns, config.model.residual) == (["moe"], "deepnorm")
    assert "attention_period" not in config_text(config)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--model.attention_period", "2", "--model.mixers=softmax"], "both say which layers are softmax attention"),
        (["--model.attention_period", "0"], "model.attention_period = '0': it must be an integer from 1 to 100,000"),
        (["--model.attention_period=2.0"], "model.attention_period = '2.0'"),
        (["--model.attention_period=1000000000000"], "model.attention_period = '1000000000000'"),
        (["--model.attention_period"], "--model.attention_period needs a value: an integer"),
        (["--model.mixer=softmax"], "did you mean --model.mixers?"),
    ],
)
def test_the_older_name_used_wrongly_is_one_line(flags: list[str], part: str) -> None:
    assert part in message_of([], flags)


@pytest.mark.parametrize("value", ["", "true", "[2]", "{}", "-1", "2\n  mixers: [softmax]"])
def test_the_older_name_used_wrongly_in_a_file_is_one_line(value: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(f"model:\n  attention_period: {value}\n")
    assert message_of([file], []).startswith(f"config file {file}: model.attention_period ")


def test_help_explains_every_field() -> None:
    text = tree_help(parse_config([], []))
    fields = {path for path in field_types() if "." in path}
    shown = {line.split()[0].removeprefix("--") for line in text.splitlines() if line.startswith("  --")}
    assert shown == fields
    # A field without a docstring would show its type in the place of an explanation.
    entries = text.split("\n  --")[1:]
    bare = [entry.split()[0] for entry in entries if " ".join(entry.split()[2:]).startswith("(type:")]
    assert bare == []


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_fresh(name: str) -> None:
    preset(name).num_layers = 1
    assert preset(name).num_layers > 1
