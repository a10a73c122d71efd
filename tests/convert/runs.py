"""What the tests of conversion and generation run on worker processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_m1.checkpoint.store import load_model
from megatron_m1.config import Config
from megatron_m1.convert.sources import open_any
from megatron_m1.generate.build import build_model
from megatron_m1.generate.sampler import forward, generate, prefill
from megatron_m1.generate.sampling import Sampling
from megatron_m1.layers.caches import Caches
from megatron_m1.layers.pack import PackedBatchParams
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.training.step import train_step
from megatron_m1.training.trained_model import TrainedModel
from tests.checkpoint.checkpoint_runs import open_checkpoints, state_at
from tests.model.meshes import my_share, packs, run_config, start

MESH = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "expert_model_parallel_size": 2,
}
"""Four processes: the expert ranks of a stage are its tensor ranks."""
MESH_SIZE = 4
CPU = torch.device("cpu")


def config_of(parallel: dict[str, Any], precision: str = "fp32", **model: Any) -> Config:
    """The small model of the mesh tests: odd widths, 7 lightning layers and 1 softmax layer, 4 experts."""
    return run_config(parallel, {"precision": precision}, **model)


def parameter_prints(trained: TrainedModel) -> dict[str, str]:
    """Hash of every parameter's bytes on this rank."""
    return {
        f"{index}.{name}": hashlib.sha256(value.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for index, chunk in enumerate(trained.chunks)
        for name, value in chunk.named_parameters()
    }


def train_and_save(rank: int, world_size: int, config: Config, folder: Path) -> dict[str, str]:
    """One step, so that no two norms are alike, and a checkpoint of it."""
    trained = start(config, world_size)
    train_step(trained, my_share(trained, packs()), lr=3e-2)
    open_checkpoints(folder / "checkpoints", config).save(trained, state_at(1))
    return parameter_prints(trained)


def load_and_save(rank: int, world_size: int, config: Config, checkpoint: Path, folder: Path) -> dict[str, str]:
    """Load weights on this mesh and save them again."""
    trained = start(config, world_size)
    load_model(trained, checkpoint)
    open_checkpoints(folder / "checkpoints", config).save(trained, state_at(1))
    return parameter_prints(trained)


def training_forward(model: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits of all tokens by the forward pass of training, prompts packed as documents: [tokens, vocabulary]."""
    bounds = [0]
    for prompt in prompts:
        bounds.append(bounds[-1] + len(prompt))
    params = PackedBatchParams.of(SequenceLayout.build(bounds))
    tokens = torch.tensor([[token for prompt in prompts for token in prompt]])
    with torch.no_grad():
        logits: Tensor = model(tokens, None, None, packed_seq_params=params)[0]
    return logits


def logits_of(rank: int, world_size: int, path: Path, prompts: list[list[int]]) -> Tensor:
    """fp32 logits of a checkpoint, a run or a Hugging Face folder by the forward pass of training."""
    return training_forward(build_model(open_any(path), torch.float32, CPU), prompts)


@dataclass
class Generated:
    """What the sampler gave, and what it should have."""

    errors: dict[str, float]
    """Largest absolute difference of logits to the forward pass of training, over the largest logit."""
    tokens: list[list[int]]
    greedy: list[list[int]]
    """Greedy continuation by the forward pass of training over the whole sequence, one prompt alone."""
    bytes_by_step: list[dict[int, int]]
    """Memory of each layer's cache, by layer number."""


def sample(rank: int, world_size: int, path: Path, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """Continue prompts."""
    model = build_model(open_any(path), torch.float32, CPU)
    tokens: list[list[int]] = [[] for _ in prompts]
    for new in generate(model, prompts, sampling):
        for sequence, token in new.items():
            tokens[sequence].append(token)
    return tokens


def generate_and_compare(
    rank: int, world_size: int, path: Path, prompts: list[list[int]], steps: int, chunks: list[int]
) -> Generated:
    """Sample greedily, and check every logit on the way."""
    tokens = sample(rank, world_size, path, prompts, Sampling(max_tokens=steps, chunk_tokens=chunks[0]))
    model = build_model(open_any(path), torch.float32, CPU)
    greedy = [_greedy(model, prompt, steps) for prompt in prompts]
    sizes: list[dict[int, int]] = []
    errors = {f"chunks of {chunk}": _worst_error(model, prompts, tokens, chunk, sizes) for chunk in chunks}
    return Generated(errors, tokens, greedy, sizes)


def _greedy(model: Any, prompt: list[int], steps: int) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(training_forward(model, [ids])[-1].argmax()))
    return ids[len(prompt) :]


def _worst_error(
    model: Any, prompts: list[list[int]], tokens: list[list[int]], chunk: int, sizes: list[dict[int, int]]
) -> float:
    whole = [training_forward(model, [[*prompt, *new]]) for prompt, new in zip(prompts, tokens, strict=True)]
    caches = Caches(len(prompts))
    sizes.clear()
    steps = [prefill(model, caches, prompts, chunk)]
    for at in range(len(tokens[0]) - 1):
        steps.append(forward(model, caches, [(i, [new[at]]) for i, new in enumerate(tokens)]))
        sizes.append(caches.nbytes())
    worst = 0.0
    for index, prompt in enumerate(prompts):
        ours = torch.stack([logits[index] for logits in steps])
        theirs = whole[index][len(prompt) - 1 : -1]
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    return worst
