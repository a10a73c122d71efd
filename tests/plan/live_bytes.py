"""What a rank really holds: parameters, gradients, optimizer state, and all that a step keeps and uses."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from megatron.core.parallel_state import get_global_memory_buffer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_m1.config import Config
from megatron_m1.training.step import train_step
from megatron_m1.training.trained_model import TrainedModel
from tests.model.meshes import my_share, packs, start


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have made while it was entered, and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.most_between = 0
        # gc does not see what C++ alone holds; what it sees was there before. Held on to: a storage that is made where
        # one of these has gone would be taken for it.
        self._before = [t.untyped_storage() for t in gc.get_objects() if isinstance(t, Tensor)]
        self._known = {storage._cdata for storage in self._before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        self.most = max(self.most, self.now)
        return result

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        weakref.finalize(storage, self._forget, key, storage.nbytes()).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def note(self, *_: Any) -> None:
        """Between two modules nothing but what is kept is there, and what the first hands to the second."""
        # What only cycles of objects still hold is garbage; when Python finds it by itself is chance.
        gc.collect()
        self.most_between = max(self.most_between, self.now)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory of tensors that may share it."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _optimizer_tensors(trained: TrainedModel) -> Iterable[Tensor]:
    for part in trained.optimizer.chained_optimizers:
        if part.optimizer is None:
            continue
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
        for group in getattr(part, "shard_fp32_from_float16_groups", []):
            yield from (p for p in group if p is not None)


def held_bytes(rank: int, world_size: int, config: Config, documents: list[list[int]]) -> dict[str, int]:
    """Bytes by part on this rank: of two steps, the second one is watched."""
    trained = start(config, world_size)
    batch = my_share(trained, packs(vocab=config.model.vocab_size, documents=documents))
    train_step(trained, batch, lr=0.0)
    held = {
        "parameters": storage_bytes(p for chunk in trained.chunks for p in chunk.parameters()),
        "gradients": storage_bytes(p.main_grad for chunk in trained.chunks for p in chunk.parameters()),
        "optimizer state": storage_bytes(_optimizer_tensors(trained)),
        "gather buffer": storage_bytes(get_global_memory_buffer().buffer.values()),
    }
    gc.collect()
    live = LiveBytes()
    # What is there by now is not looked through again and again.
    gc.freeze()
    for chunk in trained.chunks:
        chunk.register_forward_hook(partial(_note, live))
        for layer in chunk.module.decoder.layers:
            layer.register_forward_hook(partial(_note, live))
    with live:
        train_step(trained, batch, lr=0.0)
    gc.unfreeze()
    return held | {"kept": live.most_between, "most": live.most}


def _note(live: LiveBytes, *_: Any) -> None:
    live.note()
