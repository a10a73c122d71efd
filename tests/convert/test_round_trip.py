"""Bit-exact: ours to the hub's and back on any mesh, and the hub's to ours and back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from benchmarks.common.transformers_weights import expected
from megatron_m1.checkpoint.contents import read_checkpoint
from megatron_m1.checkpoint.folder import first_fault, read_manifest
from megatron_m1.config.io import load_config
from megatron_m1.convert.hub_folder import open_hub_folder
from megatron_m1.convert.our_checkpoint import open_checkpoint
from megatron_m1.convert.work import started_ranks
from megatron_m1.runtime.pool import WorkerPool
from tests.convert import runs
from tests.convert.conftest import Run
from tests.convert.folders import convert, prints, weights
from tests.reference.transformers_minimax import build

IMPORTED = Path("checkpoints") / "step_00000000"
SHAPE: dict[str, Any] = {"layers": 8, "hidden": 48, "heads": 4, "kv_heads": 2, "head_dim": 24, "ffn": 40, "experts": 5}
NATIVE: dict[str, Any] = {"rotary_dim": 24, "rope_theta": 5e5, "softmax_every": 4, "alpha": 2.5}


@pytest.fixture(scope="module")
def native_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that native transformers has saved: another softmax period, odd sizes, its own buffers."""
    folder = tmp_path_factory.mktemp("native") / "model"
    build(**SHAPE, **NATIVE, vocab=99, seed=4).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ours_to_the_hub_and_back_over_meshes(
    precision: str, request: pytest.FixtureRequest, workers: WorkerPool, tmp_path: Path
) -> None:
    """TP2 x PP2 x EP2 -> hub -> TP2 x PP2 x EP2, and -> one process -> hub."""
    run: Run = request.getfixturevalue(f"{precision}_run")
    hub, back, again = tmp_path / "hub", tmp_path / "back", tmp_path / "again"
    convert("to-hf", run.folder, hub, "--shard-size", "100KB", "--verify")
    assert len(list(hub.glob("*.safetensors"))) > 3
    convert("from-hf", hub, back, "--shard-size", "90KB", "--verify")
    assert len(list((back / IMPORTED).glob("*.distcp"))) > 3
    meshed = runs.config_of(runs.MESH, precision)
    loaded = workers.run(runs.load_and_save, meshed, back / IMPORTED, tmp_path / "meshed", world_size=runs.MESH_SIZE)
    assert loaded == run.prints
    alone = runs.config_of({}, precision)
    workers.run(runs.load_and_save, alone, back / IMPORTED, tmp_path / "alone", world_size=1)
    first = prints(weights(hub))
    assert len(first) == 3 + 7 * 6 + 6 + 8 * (1 + 3 * 4)
    for folder in (tmp_path / "meshed", tmp_path / "alone"):
        convert("to-hf", folder, again / folder.name)
        assert prints(weights(again / folder.name)) == first


def test_dtypes_and_config_of_an_export(bf16_run: Run, tmp_path: Path) -> None:
    convert("to-hf", bf16_run.checkpoint, tmp_path / "kept")
    convert("to-hf", bf16_run.checkpoint, tmp_path / "low", "--dtype", "bf16", "--max-positions", "777")
    kept, low = weights(tmp_path / "kept"), weights(tmp_path / "low")
    routers = {name for name in kept if name.endswith("block_sparse_moe.gate.weight")}
    assert len(routers) == 8
    assert {name for name, value in kept.items() if value.dtype == torch.float32} == routers | {"lm_head.weight"}
    assert {name for name, value in low.items() if value.dtype == torch.float32} == routers
    assert torch.equal(low["lm_head.weight"], kept["lm_head.weight"].bfloat16())
    config = json.loads((tmp_path / "low" / "config.json").read_text())
    assert config["max_position_embeddings"] == 777 and config["dtype"] == "bfloat16"
    convert("from-hf", tmp_path / "low", tmp_path / "wide", "--dtype", "fp32")
    metadata = FileSystemReader(tmp_path / "wide" / IMPORTED).read_metadata().state_dict_metadata
    assert {m.properties.dtype for m in metadata.values() if isinstance(m, TensorStorageMetadata)} == {torch.float32}
    assert load_config(tmp_path / "wide" / IMPORTED / "config.yaml").train.precision == "fp32"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_native_to_ours_and_back(native_folder: Path, tmp_path: Path, dtype: str) -> None:
    """What native transformers saved comes back, buffers included, and ours has what another map says."""
    source = native_folder
    if dtype == "bf16":
        source = tmp_path / "bf16"
        build(**SHAPE, **NATIVE, vocab=99, seed=4).bfloat16().save_pretrained(source)
    convert("from-hf", source, tmp_path / "ours", "--verify", "--shard-size", "100KB")
    convert("to-hf", tmp_path / "ours", tmp_path / "again", "--format", "native", "--shard-size", "300KB")
    before, after = open_weights(source), weights(tmp_path / "again")
    assert sum(name.endswith(("decay", "slope_rate")) for name in after) == 6 * 4
    for name, value in after.items():
        if name.endswith(".gate.weight"):  # stays fp32; widening loses nothing
            assert value.dtype == torch.float32
            value = value.to(before[name].dtype)
        assert prints({name: value}) == prints({name: before[name]}), name
    assert after.keys() == before.keys()


def open_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_ours_is_what_an_independent_map_says(native_folder: Path, tmp_path: Path) -> None:
    theirs = build(**SHAPE, **NATIVE, vocab=99, seed=4)
    convert("from-hf", native_folder, tmp_path / "ours")
    ours = open_checkpoint(tmp_path / "ours" / IMPORTED)
    read = {}
    for unit in ours.units:
        name = unit.ours.replace(".experts.experts.", f".experts.local_experts.{unit.expert}.")
        read[name] = ours.read(unit)
    for name, value in expected(theirs):
        assert torch.equal(read.pop(name).view(value.shape), value), name
    assert not read


def test_the_hub_to_ours_and_back(native_folder: Path, tmp_path: Path) -> None:
    """Names and dtypes of the hub: no buffers, bf16, router fp32."""
    convert("from-hf", native_folder, tmp_path / "first")
    words = ("--dtype", "bf16", "--shard-size", "111KB", "--max-positions", "54321")
    convert("to-hf", tmp_path / "first", tmp_path / "hub", *words)
    convert("from-hf", tmp_path / "hub", tmp_path / "ours", "--verify")
    convert("to-hf", tmp_path / "ours", tmp_path / "again", "--shard-size", "1GB")
    assert prints(weights(tmp_path / "again")) == prints(weights(tmp_path / "hub"))
    assert len(list((tmp_path / "again").glob("*.safetensors"))) == 1
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "hub" / name).read_text()


def test_what_an_export_says(native_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert("from-hf", native_folder, tmp_path / "ours")
    capsys.readouterr()
    convert("to-hf", tmp_path / "ours", tmp_path / "hub", "--dry-run")
    planned = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "hub").exists()
    convert("to-hf", tmp_path / "ours", tmp_path / "hub", "--format", "native")
    said = capsys.readouterr().out.splitlines()
    size = sum(value.nbytes for value in weights(tmp_path / "hub").values())
    assert re.fullmatch(rf".*/hub: {len(weights(tmp_path / 'hub'))} tensors, {size:,} bytes in 1 file, .*", said[0])
    assert re.match(r"would write \d+ tensors, .* 6 lightning and 2 softmax layers, float32$", planned[0])
    tokenizer = "note: no tokenizer was written: the checkpoint names none; give --tokenizer"
    epsilon = "note: vLLM uses 1e-05 in the norm inside lightning layers, this model 1e-06: "
    assert planned[1] == said[1] == tokenizer
    assert planned[2].startswith(epsilon) and "up to 0.23.0" in planned[3] and len(planned) == 4
    assert said[2].startswith("note: vLLM can't read this format") and len(said) == 3


def test_remote_code_is_copied_and_named(native_folder: Path, tmp_path: Path) -> None:
    """As in the released config.json."""
    code = tmp_path / "code"
    code.mkdir()
    config, model = "configuration_minimax_m1", "modeling_minimax_m1"
    for name in (config, model):
        (code / f"{name}.py").write_text(f"# {name}\n")
    convert("from-hf", native_folder, tmp_path / "ours")
    convert("to-hf", tmp_path / "ours", tmp_path / "plain")
    convert("to-hf", tmp_path / "ours", tmp_path / "hub", "--remote-code", code)
    assert "auto_map" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert not list((tmp_path / "plain").glob("*.py"))
    for name in (config, model):
        assert (tmp_path / "hub" / f"{name}.py").read_bytes() == (code / f"{name}.py").read_bytes()
    real = json.loads((Path(__file__).parent / "minimax_m1/config.json").read_text())
    assert json.loads((tmp_path / "hub/config.json").read_text())["auto_map"] == real["auto_map"]


def test_an_import_is_a_checkpoint_like_any_other(native_folder: Path, tmp_path: Path) -> None:
    convert("from-hf", native_folder, tmp_path / "ours")
    checkpoint = tmp_path / "ours" / IMPORTED
    contents = read_checkpoint(checkpoint)
    assert contents.step == 0 and contents.config.model == open_hub_folder(native_folder).model
    files = read_manifest(checkpoint)
    assert set(files) == {path.name for path in checkpoint.iterdir()} - {"integrity.json"}
    assert first_fault(checkpoint, files) is None
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["checkpoints"]
    assert (tmp_path / "ours" / "checkpoints" / "latest").read_text() == "step_00000000\n"


def shared_conversion(rank: int, world_size: int, words: list[list[str]]) -> list[int]:
    """The command on every rank, as under torchrun."""
    from megatron_m1.cli import run

    return [run(["convert", *line]) for line in words]


def shared_refusal(rank: int, world_size: int, words: list[str]) -> str:
    """What a rank of ``megatron-m1 convert`` under torchrun says of wrong input."""
    from megatron_m1.cli import run

    try:
        run(["convert", *words])
    except ValueError as error:
        return str(error)
    return ""


def patience(rank: int, world_size: int) -> float:
    """Seconds that a rank of a conversion waits for another."""
    with started_ranks() as ranks:
        assert (ranks.rank, ranks.size) == (rank, world_size)
        group = dist.group.WORLD
        assert group is not None
        return float(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())


def test_a_rank_with_hours_of_work_more_is_waited_for(workers: WorkerPool) -> None:
    """By themselves, torch's groups give up after half an hour."""
    assert workers.run(patience, world_size=2, process_group=False) == [7 * 24 * 3600.0] * 2


def test_ranks_share_the_work(workers: WorkerPool, fp32_run: Run, tmp_path: Path) -> None:
    """Two processes give the same bytes as one, also of rows that are drawn."""
    rows = ["--resize-vocab", "130", "--resize-init", "normal"]
    convert("to-hf", fp32_run.folder, tmp_path / "one", "--shard-size", "100KB")
    convert("from-hf", tmp_path / "one", tmp_path / "ours-one", "--shard-size", "100KB", *rows)
    lines = [
        ["to-hf", str(fp32_run.folder), str(tmp_path / "two"), "--shard-size", "100KB", "--verify"],
        ["from-hf", str(tmp_path / "one"), str(tmp_path / "ours-two"), "--shard-size", "100KB", "--verify", *rows],
    ]
    for line in lines:
        assert workers.run(shared_conversion, [line], world_size=2, process_group=False) == [[0], [0]]
        # What only rank 0 can see, every rank says.
        refused = workers.run(shared_refusal, line, world_size=2, process_group=False)
        assert refused == [f"{line[2]} exists: choose another folder, or remove it"] * 2
    for one, two in (("one", "two"), (f"ours-one/{IMPORTED}", f"ours-two/{IMPORTED}")):
        names = {path.name for path in (tmp_path / one).iterdir()}
        assert names == {path.name for path in (tmp_path / two).iterdir()}
        for name in names - {".metadata", "integrity.json"}:  # which carry an id and a path
            assert (tmp_path / one / name).read_bytes() == (tmp_path / two / name).read_bytes(), name
