"""megatron-m1: pretraining of MiniMax-M1-class models on megatron-core.

What this module offers is a promise: ``docs/library.md`` has it by example. Importing it imports nothing else; torch,
megatron-core and transformers come when a name is used that needs them.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_m1.config import Config, ModelConfig
    from megatron_m1.library.data import packed_data
    from megatron_m1.library.load import load, meta_model, parameter_counts
    from megatron_m1.library.model import Generation, Model
    from megatron_m1.library.packs import Pack, PackedData, PackedDocument
    from megatron_m1.plan.parameters import ParameterCounts

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Generation",
    "Model",
    "ModelConfig",
    "Pack",
    "PackedData",
    "PackedDocument",
    "ParameterCounts",
    "__version__",
    "load",
    "meta_model",
    "packed_data",
    "parameter_counts",
]

_HOMES = {
    "config": ("Config", "ModelConfig"),
    "library.data": ("packed_data",),
    "library.load": ("load", "meta_model", "parameter_counts"),
    "library.model": ("Generation", "Model"),
    "library.packs": ("Pack", "PackedData", "PackedDocument"),
    "plan.parameters": ("ParameterCounts",),
}

if not os.path.exists("/dev/nvidiactl"):
    # A transformer-engine that is installed but finds no GPU raises RuntimeError inside every megatron-core import.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            from megatron_m1.library.quiet import quiet_libraries

            with quiet_libraries():
                return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
