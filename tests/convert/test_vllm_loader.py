"""Exported folders through a loader written from vLLM's behaviour."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_m1.runtime.pool import WorkerPool
from tests.convert import runs
from tests.convert.conftest import Run
from tests.convert.folders import convert
from tests.convert.test_generate import prompts_of
from tests.reference import vllm_loader
from tests.tolerances import of_largest, whole_model

PROMPT = prompts_of([45])


@pytest.fixture(scope="module")
def exported(fp32_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "hub"
    convert("to-hf", fp32_run.folder, folder)
    return folder


@pytest.fixture(scope="module")
def ours(workers: WorkerPool, fp32_run: Run) -> torch.Tensor:
    (logits,) = workers.run(runs.logits_of, fp32_run.folder, PROMPT, world_size=1)
    assert isinstance(logits, torch.Tensor)
    return logits


@pytest.mark.parametrize("size", [1, 2])
def test_every_name_is_consumed_and_the_logits_come_out(size: int, exported: Path, ours: torch.Tensor) -> None:
    """With M1's epsilon in the lightning norm; vLLM's own is the fault that the command names."""
    theirs = vllm_loader.Model(exported, size, norm_epsilon=1e-6).logits(torch.tensor(PROMPT[0]))
    assert theirs.abs().max() > 1
    error = of_largest(whole_model(runs.config_of({}).model, len(PROMPT[0])), theirs.numel())
    assert (ours - theirs).abs().max() < error * theirs.abs().max()
    as_vllm = vllm_loader.Model(exported, size).logits(torch.tensor(PROMPT[0]))
    assert (ours - as_vllm).abs().max() > 5 * (ours - theirs).abs().max()


def change(source: Path, target: Path, *, without: str = "", extra: str = "") -> Path:
    """A copy of a folder with one name less or more."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    (file,) = source.glob("*.safetensors")
    held = load_file(file)
    held.pop(without, None)
    if extra:
        held[extra] = torch.ones(1)
    save_file(held, target / file.name)
    return target


def test_extras_and_gaps_are_errors(exported: Path, fp32_run: Run, tmp_path: Path) -> None:
    convert("to-hf", fp32_run.folder, tmp_path / "native", "--format", "native")
    keys = json.loads((exported / "config.json").read_text())
    (tmp_path / "native" / "config.json").write_text(json.dumps(keys))
    with pytest.raises(KeyError, match=r"self_attn\.(slope_rate|.*_decay)"):
        vllm_loader.Model(tmp_path / "native", 1)
    with pytest.raises(KeyError, match="shared_mlp"):
        vllm_loader.Model(change(exported, tmp_path / "more", extra="model.layers.0.shared_mlp.w1.weight"), 1)
    for name in ("model.layers.7.self_attn.k_proj.weight", "model.layers.3.block_sparse_moe.experts.2.w3.weight"):
        with pytest.raises(ValueError, match="nothing fills"):
            vllm_loader.Model(change(exported, tmp_path / name, without=name), 2)
