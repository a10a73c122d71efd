"""The console command in this process: what it prints, its exit status, one line for everything wrong."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as torch_checkpoint

from megatron_m1 import cli
from megatron_m1.commands import launching
from megatron_m1.config.io import parse_config
from megatron_m1.config.written import write_config
from megatron_m1.data.demo.corpus import MAX_VOCAB_SIZE, check_own_data
from megatron_m1.data.tokenizers import load_tokenizer, train_sentencepiece

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "examples" / "configs"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """``command("inspect", "--preset", "tiny")`` -> status, stdout, stderr, outside of any launcher."""
    for name in ("RANK", "WORLD_SIZE", "NNODES", "NODE_RANK", "GPUS_PER_NODE", "SLURM_NNODES", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        status = cli.exit_status(lambda: cli.run([str(argument) for argument in arguments]))
        out, err = capsys.readouterr()
        return status, out, err

    return run


def assert_refused(result: tuple[int, str, str], *parts: str) -> None:
    """Check for status 2, nothing on stdout and one line on stderr that has all ``parts``."""
    status, out, err = result
    assert (status, out) == (2, ""), err
    assert err.startswith("megatron-m1: error: ")
    assert err.count("\n") == 1
    assert [part for part in parts if part not in err] == [], err


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with 500 tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(
        (file.read_text() for file in sorted((ROOT / "megatron_m1").glob("*.py"))), path, vocab_size=500
    )
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Prefix of a tokenised corpus of documents with 3 and 4 tokens, written byte by byte in Megatron's format."""
    prefix = tmp_path / "corpus"
    Path(f"{prefix}.bin").write_bytes(struct.pack("<7H", 5, 6, 1, 7, 8, 9, 1))
    # Magic, version, dtype code of uint16, sequences, documents + 1; lengths; byte offsets; document bounds.
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)
    Path(f"{prefix}.idx").write_bytes(header + struct.pack("<2i2q3q", 3, 4, 0, 6, 0, 1, 2))
    return prefix


def dry_run(corpus: Path, tokenizer: Path, *more: object) -> list[object]:
    """Arguments of a dry run of tiny on a corpus of the tests."""
    data = ["--data.train", f"[1.0, {corpus}]", "--data.tokenizer", tokenizer]
    return ["pretrain", "--dry-run", *data, "--run.folder", corpus.parent / "run", *more]


def test_the_version_is_told_without_importing_what_has_one() -> None:
    code = "import sys; from megatron_m1 import cli; cli.run(['--version']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    found = [f"{name} {version(name)}" for name in ("megatron-m1", "megatron-core", "torch")]
    assert done.stdout == f"{', '.join(found)}\nFalse\n"


def test_help_lists_commands_and_options(command: Run) -> None:
    status, out, _ = command("--help")
    assert status == 0
    assert [name for name in cli.COMMANDS if name not in out] == []
    status, out, _ = command("pretrain", "--help")
    assert status == 0
    assert "--parallel.tensor_model_parallel_size" in out
    assert "Tokens of linear warm-up" in out


@pytest.mark.parametrize(
    ("preset", "layers", "length"), [((), 8, 512), (("--preset", "tiny"), 8, 512), (("--preset=m1-456b",), 80, 8192)]
)
def test_help_has_the_defaults_of_one_preset(command: Run, preset: tuple[str, ...], layers: int, length: int) -> None:
    """And they are what a run has."""
    status, out, _ = command("pretrain", *preset, "--help")
    name = preset[-1].rpartition("=")[2] if preset else "tiny"
    assert status == 0 and f"(defaults are those of the preset {name}, of another one with" in out
    assert "The defaults are" not in out
    given = parse_config([], [], name)
    text = " ".join(out.split())
    for field, value, default in (
        ("--model.num_layers", given.model.num_layers, layers),
        ("--data.seq_length", given.data.seq_length, length),
    ):
        assert value == default
        assert f"(type: int, default: {default})" in text.partition(field)[2].partition(" --")[0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["pretrian"], ["pretrian", "pretrain"]),
        (["inspect", "--prest", "tiny"], ["--prest", "--preset"]),
        (["inspect"], ["--preset", "--checkpoint", "CHECKPOINT_OR_RUN"]),
        (["inspect", "--preset", "tiny", "runs/x"], ["give one of"]),
        (["inspect", "--preset", "m1"], ["'m1'", "m1-456b"]),
        (["inspect", "--preset", "tiny", "--model.num_layer", "8"], ["--model.num_layers"]),
        (["inspect", "no/such/run"], ["no/such/run"]),
        (["tokenize", "x.jsonl"], ["--output", "--tokenizer"]),
        (["tokenize", "x.jsonl", "--output", "x", "--tokenizer", "t", "--workers", "0"], ["'0'"]),
        (["tokenize", "no-such.jsonl", "--output", "x", "--tokenizer", "t"], ["no-such.jsonl"]),
        (["pretrain", "--world-size", "4"], ["--world-size", "--dry-run"]),
        (["pretrain", "--dry-run", "--world-size", "none"], ["'none'"]),
        (["pretrain", "--config", "no.yaml"], ["no.yaml"]),
        (["pretrain", "--config=~/no.yaml"], [str(Path("~/no.yaml").expanduser())]),
        (["inspect", "~/no-such-run"], [str(Path("~/no-such-run").expanduser())]),
        (["generate", "$NO_SUCH_VARIABLE/run", "--prompt", "x"], ["NO_SUCH_VARIABLE is not set"]),
        (["generate", "x", "--prompt", "x", "--tokenizer=~no-such-user/t"], ["no user no-such-user"]),
        (["convert", "to-hf", "x", "$NO_SUCH_VARIABLE"], ["argument OUT", "NO_SUCH_VARIABLE is not set"]),
        (["convert", "from-hf", "$NO_SUCH_VARIABLE", "y"], ["NO_SUCH_VARIABLE is not set"]),
        (["tokenize", "$NO_SUCH_VARIABLE", "--output=x", "--tokenizer=t"], ["NO_SUCH_VARIABLE is not set"]),
        (["tokenize", "x", "--output=$NO_SUCH_VARIABLE", "--tokenizer=t"], ["--output", "NO_SUCH_VARIABLE"]),
        (["tokenize", "x", "--output=x", "--tokenizer=$NO_SUCH_VARIABLE"], ["--tokenizer", "NO_SUCH_VARIABLE"]),
        (["pretrain", "--train.max_step", "4"], ["--train.max_steps"]),
        (["pretrain", "--dryrun"], ["--dryrun", "did you mean --dry-run?"]),
        (
            ["pretrain", "--dry-run", "--config", str(CONFIGS / "tiny.yaml")],
            ["a stage has 1 (world 1", "start a multiple of 2"],
        ),
    ],
)
def test_a_wrong_command_line_is_one_line(command: Run, arguments: list[str], parts: list[str]) -> None:
    assert_refused(command(*arguments), *parts)


def test_inspect_counts_a_preset(command: Run) -> None:
    status, out, err = command("inspect", "--preset", "m1-456b")
    assert (status, err) == (0, "")
    total = next(line for line in out.splitlines() if line.startswith("total"))
    assert total.split() == ["total", "456,089,655,296", "48,403,306,496"]
    assert sum(" softmax " in line for line in out.splitlines()[12:]) == 10


def test_inspect_counts_an_overridden_preset(command: Run) -> None:
    _, small, _ = command("inspect", "--preset", "tiny")
    _, large, _ = command("inspect", "--preset", "tiny", "--model.num_layers=16")
    assert "8 layers" in small
    assert "16 layers" in large


def test_dry_run_prints_the_plan_and_leaves_nothing(command: Run, corpus: Path, tokenizer: Path) -> None:
    before = sorted(corpus.parent.iterdir())
    status, out, err = command(
        *dry_run(
            corpus, tokenizer, "--nproc-per-node", 4, "--parallel.tensor_model_parallel_size", 2, "--train.max_steps", 5
        )
    )
    assert (status, err) == (0, "")
    assert "tensor 2 x context 1 x pipeline 1 x data 2 = 4" in out
    assert "1 node x 4" in out
    assert "2 documents, 7 tokens" in out
    assert f"{5 * 8 * 512:,} tokens" in out
    assert sorted(corpus.parent.iterdir()) == before


def test_dry_run_says_what_a_context_rank_gets(command: Run, corpus: Path, tokenizer: Path) -> None:
    sizes = [
        "--parallel.context_parallel_size",
        3,
        "--parallel.tensor_model_parallel_size",
        2,
        "--data.seq_length",
        200,
    ]
    status, out, _ = command(*dry_run(corpus, tokenizer, "--world-size", 6, *sizes))
    assert status == 0
    assert "packs       204 tokens each, 4 of them padding at its end, 68 on every context rank" in out


@pytest.mark.parametrize(("name", "world_size"), [("tiny", 2), ("m1-mid", 1), ("m1-mid", 8), ("m1-456b", 2048)])
def test_the_example_configurations_are_valid(command: Run, name: str, world_size: int, tmp_path: Path) -> None:
    device = "cpu" if name == "tiny" else "gpu"
    status, out, err = command(
        *[
            "pretrain",
            "--config",
            CONFIGS / f"{name}.yaml",
            "--dry-run",
            "--world-size",
            world_size,
            "--device",
            device,
        ],
        *["--data.embedded_corpus", tmp_path / "corpus", "--run.folder", tmp_path / "run"],
    )
    assert (status, err) == (0, "")
    assert f"world       {world_size:,} process{'es' if world_size > 1 else ''} (--world-size)" in out
    assert f"to be built in {tmp_path / 'corpus'}" in out
    assert list(tmp_path.iterdir()) == []


def test_a_mesh_that_does_not_fit_is_refused(command: Run, corpus: Path, tokenizer: Path) -> None:
    flags = ["--parallel.tensor_model_parallel_size", 2, "--nproc-per-node", 3]
    assert_refused(command(*dry_run(corpus, tokenizer, *flags)), "tensor 2 x", "3 processes")


def test_missing_data_are_refused(command: Run, corpus: Path, tokenizer: Path) -> None:
    assert_refused(command("pretrain", "--dry-run", "--run.folder", corpus.parent / "r"), "data.train is empty")
    assert_refused(
        command("pretrain", "--run.folder", corpus.parent / "r"), "r does not exist, and data.train is empty"
    )
    assert_refused(command("pretrain", "--run.folder", corpus.parent), "has no run to go on with")
    assert_refused(command("inspect", f"{corpus}.idx"), "is a file: give a checkpoint or a run folder")
    Path(f"{corpus}.idx").unlink()
    assert_refused(command(*dry_run(corpus, tokenizer)), "data.train", f"{corpus}.idx")


def test_truncated_data_are_refused(command: Run, corpus: Path, tokenizer: Path) -> None:
    path = Path(f"{corpus}.bin")
    path.write_bytes(path.read_bytes()[:-2])
    assert_refused(command(*dry_run(corpus, tokenizer)), str(path), "12 bytes", "14")


def test_a_corpus_without_a_sidecar_is_named(command: Run, corpus: Path, tokenizer: Path) -> None:
    status, out, _ = command(*dry_run(corpus, tokenizer))
    assert status == 0
    assert f"warning: no sidecar {corpus}.json:" in out
    Path(f"{corpus}.json").write_text('{"text": "what it was made of"}\n')
    status, out, _ = command(*dry_run(corpus, tokenizer))
    assert status == 0
    assert f"warning: no sidecar {corpus}.json, which is something else:" in out
    sidecar = {"documents": 2, "tokens": 7, "tokenizer_digest": load_tokenizer(tokenizer).digest(), "vocab_size": 500}
    Path(f"{corpus}.json").write_text(json.dumps(sidecar))
    status, out, _ = command(*dry_run(corpus, tokenizer))
    assert status == 0
    assert "sidecar" not in out


def test_ids_beyond_the_vocabulary_are_refused(command: Run, corpus: Path, tokenizer: Path) -> None:
    content = bytearray(Path(f"{corpus}.bin").read_bytes())
    content[6:8] = (500).to_bytes(2, "little")
    Path(f"{corpus}.bin").write_bytes(content)
    assert_refused(command(*dry_run(corpus, tokenizer)), f"data.train: {corpus} has the id 500 at token 3, in document")
    assert not (corpus.parent / "run").exists()


def test_a_corpus_named_twice_is_said(command: Run, corpus: Path, tokenizer: Path) -> None:
    winding = f"{corpus.parent}/./{corpus.name}"
    status, out, _ = command(*dry_run(corpus, tokenizer, "--data.train", f"[0.5, {corpus}, 0.5, {winding}]"))
    assert status == 0
    assert f"note: data.train names {corpus} again as {winding}: taken as one corpus" in out
    assert f"train       100.0% {corpus}" in out


def test_validation_on_training_data_is_refused_unless_asked(command: Run, corpus: Path, tokenizer: Path) -> None:
    shared = ["--data.validation", f"[{corpus.parent}/../{corpus.parent.name}/{corpus.name}]"]
    result = command(*dry_run(corpus, tokenizer, *shared))
    assert_refused(result, "data.validation names", str(corpus), "data.allow_shared_validation")
    status, _, _ = command(*dry_run(corpus, tokenizer, *shared, "--data.allow_shared_validation", "true"))
    assert status == 0


def test_a_corpus_of_another_tokenizer_is_refused(command: Run, corpus: Path, tokenizer: Path) -> None:
    sidecar = {"documents": 2, "tokens": 7, "tokenizer_digest": "f" * 64, "vocab_size": 500}
    Path(f"{corpus}.json").write_text(json.dumps(sidecar))
    assert_refused(command(*dry_run(corpus, tokenizer)), str(corpus), "another tokenizer")


def test_a_tokenizer_larger_than_the_embedding_is_refused(command: Run, corpus: Path, tokenizer: Path) -> None:
    result = command(*dry_run(corpus, tokenizer, "--model.vocab_size", 499))
    assert_refused(result, "500 tokens", "model.vocab_size = 499", "at least 500")


def test_own_data_beside_the_embedded_corpus_name_the_cure(command: Run, corpus: Path, tokenizer: Path) -> None:
    tiny = ["--config", CONFIGS / "tiny.yaml", "--data.embedded_corpus", corpus.parent / "embedded"]
    plan = [*dry_run(corpus, tokenizer, *tiny), "--world-size", 2]
    assert_refused(command(*plan), "data.validation is empty", "tokenize --split", "--data.embedded_corpus none")
    assert_refused(command(*plan, "--data.train", "[]"), "data.train is empty", str(tokenizer))
    # With both blends of its own, and without any other's, the run has all that it needs.
    shared = ["--data.validation", f"[{corpus}]", "--data.allow_shared_validation", "true"]
    assert command(*plan, *shared)[0] == 0
    assert command(*plan, "--data.embedded_corpus", "none")[0] == 0


def test_own_data_made_with_the_embedded_tokenizer_go_with_the_embedded_validation(tmp_path: Path) -> None:
    (tmp_path / "corpus" / "bpe-300").mkdir(parents=True)
    own, copied = tmp_path / "corpus" / "bpe-300" / "tokenizer.model", tmp_path / "copy.model"
    own.write_bytes(b"a model")
    copied.write_bytes(b"a model")
    for tokenizer in (own, copied):
        check_own_data(tmp_path / "corpus", train=["mine"], validation=[], tokenizer=str(tokenizer))
    copied.write_bytes(b"another")
    with pytest.raises(ValueError, match="hold out a part of yours"):
        check_own_data(tmp_path / "corpus", train=["mine"], validation=[], tokenizer=str(copied))


def test_more_rows_than_the_embedded_tokenizer_has_tokens_are_said(command: Run, tmp_path: Path) -> None:
    plan = ["pretrain", "--dry-run", "--data.embedded_corpus", tmp_path / "corpus", "--run.folder", tmp_path / "run"]
    status, out, _ = command(*plan, "--model.vocab_size", MAX_VOCAB_SIZE)
    assert (status, "note: model.vocab_size" in out) == (0, False)
    status, out, _ = command(*plan, "--model.vocab_size", 32_768)
    assert status == 0
    assert "note: model.vocab_size is 32,768, but the embedded corpus' tokenizer has 16,384 tokens at most" in out
    assert "--model.vocab_size 16384" in out


def test_a_missing_or_damaged_tokenizer_is_refused(command: Run, corpus: Path, tmp_path: Path) -> None:
    assert_refused(command(*dry_run(corpus, tmp_path / "no.model")), "no.model")
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(b"not a model")
    assert_refused(command(*dry_run(corpus, damaged)), str(damaged))


def test_an_unwritable_run_folder_is_refused(command: Run, corpus: Path, tokenizer: Path) -> None:
    file = corpus.parent / "file"
    file.touch()
    assert_refused(command(*dry_run(corpus, tokenizer, "--run.folder", file)), str(file), "another folder")
    assert_refused(command(*dry_run(corpus, tokenizer, "--run.folder", file / "below")), str(file), "another folder")
    # A file system on which nobody, root included, can make files.
    assert_refused(command(*dry_run(corpus, tokenizer, "--run.folder", "/proc/run")), "/proc/run", "another folder")
    nowhere = ["pretrain", "--dry-run", "--run.folder", corpus.parent / "run", "--data.embedded_corpus", "/proc/corpus"]
    assert_refused(command(*nowhere), "data.embedded_corpus = /proc/corpus", "another folder")
    cache = dry_run(corpus, tokenizer, "--data.cache_folder", file / "below")
    assert_refused(command(*cache), f"data.cache_folder = {file}", "another folder")


def test_not_resuming_refuses_a_folder_with_checkpoints(command: Run, corpus: Path, tokenizer: Path) -> None:
    (corpus.parent / "run" / "checkpoints" / "step_00000010").mkdir(parents=True)
    for flags in (["--run.resume", "false"], ["--no-resume"]):
        assert_refused(command(*dry_run(corpus, tokenizer, *flags)), "run.resume is false")
    assert command(*dry_run(corpus, tokenizer, "--resume"))[0] == 0
    status, _, _ = command(*dry_run(corpus, tokenizer))
    assert status == 0


def test_workers_do_not_see_the_launch_options() -> None:
    given = ["--nproc-per-node", "2", "--train.seed", "3", "--nproc-per-node=4", "--run.resume", "false"]
    assert launching.without_launch_options(given) == ["--train.seed", "3", "--run.resume", "false"]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with one checkpoint of two tensors and one object, and a save that did not finish."""
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoints" / "step_00000020"
    state = {"layer.weight": torch.ones(3, 5, dtype=torch.bfloat16), "moment": torch.ones(7), "extra": "text"}
    torch_checkpoint.save(state, checkpoint_id=checkpoint, no_dist=True)
    write_config(parse_config([], []), checkpoint / "config.yaml")
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (checkpoint / "state.json").write_text(json.dumps({"step": 20, "tokens": 81_920}))
    (folder / "checkpoints" / "step_00000030").mkdir()
    return folder


def test_inspect_shows_a_run_and_its_newest_checkpoint(command: Run, run_folder: Path) -> None:
    status, out, err = command("inspect", run_folder, "--tensors")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"run {run_folder}: step_00000020"
    assert f"step 20, {20 * 8 * 512:,} tokens" in lines[2]
    assert "    max_steps: null" in lines
    assert [" ".join(line.split()) for line in lines[-2:]] == [
        "layer.weight bfloat16 [3, 5] 30 bytes",
        "moment float32 [7] 28 bytes",
    ]
    checkpoint = run_folder / "checkpoints" / "step_00000020"
    for named in ([checkpoint], ["--checkpoint", checkpoint]):
        assert command("inspect", *named, "--tensors") == (0, "\n".join(lines[1:]) + "\n", "")
    assert_refused(command("inspect", checkpoint / "state.json"), "state.json is a file: give a checkpoint or a run")
    assert command("inspect", run_folder)[1].splitlines()[-1] == "2 tensors, 58 bytes (0.00 GiB) (--tensors lists them)"


def test_another_shape_than_the_checkpoint_is_refused_before_anything_starts(
    command: Run, run_folder: Path, corpus: Path, tokenizer: Path
) -> None:
    plan = dry_run(corpus, tokenizer, "--run.folder", run_folder)
    assert_refused(command(*plan, "--model.num_layers", 16), "model.num_layers is 16", "step_00000020 has 8")
    status, out, _ = command(*plan)
    assert status == 0
    assert f"run folder  {run_folder}, goes on from step_00000020" in out


def test_a_damaged_checkpoint_is_one_line(command: Run, run_folder: Path) -> None:
    checkpoint = run_folder / "checkpoints" / "step_00000020"
    data = next(checkpoint.glob("*.distcp"))
    whole, metadata = data.read_bytes(), (checkpoint / ".metadata").read_bytes()

    def refused(*parts: str) -> None:
        assert_refused(command("inspect", "--checkpoint", checkpoint), str(checkpoint), *parts)

    data.write_bytes(whole[:-1])
    refused("damaged", data.name)
    data.unlink()
    refused("damaged", f"{data.name} is missing")
    data.write_bytes(whole)
    for torn in (metadata[: len(metadata) // 2], b"", b"\x80\x04nonsense"):
        (checkpoint / ".metadata").write_bytes(torn)
        refused("damaged", ".metadata")
    (checkpoint / ".metadata").write_bytes(metadata)
    (checkpoint / "config.yaml").write_text("model: {num_layer: 8}")
    assert_refused(command("inspect", "--checkpoint", checkpoint), "config.yaml", "model.num_layers")
    (checkpoint / "metadata.json").unlink()
    refused("incomplete")
    assert_refused(command("inspect", run_folder), "no complete checkpoint")
