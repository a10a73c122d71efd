"""The promise: names, signatures, what is imported when, and the faults that are found before torch is."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import megatron_m1

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "megatron.core", "transformers", "tensorboard", "rich", "tokenizers", "pyarrow")
PATHS = "path: 'AnyPath'"
SIGNATURES = {
    "load": f"({PATHS}, *, device: 'torch.device | str' = 'auto', dtype: 'torch.dtype | str | None' = None, "
    "tokenizer: 'AnyPath | Tokenizer | None' = None) -> 'Model'",
    "parameter_counts": "(model: 'Described | Path') -> 'ParameterCounts'",
    "meta_model": "(model: 'Described | Path', *, dtype: 'torch.dtype | str' = 'bf16') -> 'nn.Module'",
    "packed_data": "(source: 'AnyPath | Config | Sequence[str]', *, "
    "split: \"Literal['train', 'validation']\" = 'train', "
    "seq_length: 'int | None' = None, num_samples: 'int | None' = None, seed: 'int | None' = None, "
    "tokenizer: 'AnyPath | Tokenizer | None' = None, cache_folder: 'AnyPath | None' = None, "
    "reset_at_documents: 'bool | None' = None) -> 'PackedData'",
    "Model.logits": "(self, inputs: 'Inputs') -> 'Tensor | list[Tensor]'",
    "Model.loss": "(self, inputs: 'Inputs', *, per_token: 'bool' = False) -> 'Tensor | list[Tensor]'",
    "Model.generate": "(self, prompts: 'str | Ids | Iterable[str | Ids]', *, max_tokens: 'int' = 64, "
    "temperature: 'float' = 0.0, top_p: 'float' = 1.0, seed: 'int' = 1234, chunk_tokens: 'int' = 2048) "
    "-> 'Generation | list[Generation]'",
}
MEMBERS = {
    "Model": ["config", "device", "dtype", "generate", "logits", "loss", "module", "parameter_counts", "tokenizer"],
    "Generation": ["ids", "text"],
    "PackedData": ["seq_length", "tokenizer"],
    "Pack": ["cu_seqlens", "documents", "extra", "labels", "loss_mask", "padding", "real_tokens", "tokens"],
    "PackedDocument": ["corpus", "end", "index", "offset", "start", "text", "tokenizer", "tokens"],
    "ParameterCounts": ["active", "all", "layers", "total"],
}


def test_signatures_are_kept() -> None:
    for dotted, expected in SIGNATURES.items():
        value: Any = megatron_m1
        for name in dotted.split("."):
            value = getattr(value, name)
        assert str(inspect.signature(value)) == expected, dotted


def _public(kind: Any) -> list[str]:
    own = {name for base in kind.__mro__ if base.__module__.startswith("megatron_m1") for name in vars(base)}
    own |= {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    assigned = set(re.findall(r"^ +self\.(\w+) = ", inspect.getsource(kind), re.MULTILINE))
    return sorted(name for name in own | assigned if not name.startswith("_"))


def test_members_are_kept() -> None:
    assert {name: _public(getattr(megatron_m1, name)) for name in MEMBERS} == MEMBERS


def test_every_name_is_there_and_documented() -> None:
    public = set(megatron_m1.__all__)
    assert public <= set(dir(megatron_m1))
    assert {name for name in dir(megatron_m1) if not name.startswith("_")} == public - {"__version__"}
    for name in public - {"__version__"}:
        assert inspect.getdoc(getattr(megatron_m1, name)), name
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        megatron_m1.laod  # noqa: B018


def test_editors_and_type_checkers_see_the_same() -> None:
    """They read the imports under TYPE_CHECKING, and do not run ``__getattr__``."""
    tree = ast.parse((ROOT / "megatron_m1" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name))
    seen: dict[str, str] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        assert node.module is not None
        seen |= {alias.name: node.module for alias in node.names}
    assert seen == {name: f"megatron_m1.{home}" for home, names in megatron_m1._HOMES.items() for name in names}
    assert {*seen, "__version__"} == set(megatron_m1.__all__)


def imported_after(*lines: str) -> tuple[set[str], list[str]]:
    """Run lines in a fresh Python; returns which of HEAVY it imported, and what the lines printed."""
    code = "\n".join([*lines, "import json, sys", f"print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    *printed, modules = done.stdout.splitlines()
    return set(json.loads(modules)), printed


def test_importing_it_imports_nothing_heavy() -> None:
    assert imported_after("import megatron_m1", "assert megatron_m1.__version__", "dir(megatron_m1)")[0] == set()


def test_counting_and_looking_up_functions_need_no_torch() -> None:
    modules, printed = imported_after(
        "import megatron_m1",
        "megatron_m1.load, megatron_m1.meta_model, megatron_m1.packed_data, megatron_m1.Config",
        "print(megatron_m1.parameter_counts('m1-456b').total)",
    )
    assert not modules & {"torch", "megatron.core", "transformers"}
    assert printed == ["456089655296"]


def test_faults_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text('{"model_type": "llama"}')
    calls = {
        "load('nothing')": "nothing does not exist: give a run, a checkpoint or a local Hugging Face folder",
        f"load({str(tmp_path / 'empty')!r})": "has no complete one below checkpoints/",
        f"load({str(tmp_path / 'hub')!r})": "model_type = 'llama'",
        "meta_model('tinny')": "tinny is no preset (tiny, m1-mid, m1-456b) and no path",
        "parameter_counts(megatron_m1.ModelConfig(num_layers=0))": "model.num_layers = 0",
        "packed_data('nothing', seq_length=8)": "nothing.bin does not exist",
        "packed_data([], seq_length=8)": "the blend is empty",
        "packed_data(megatron_m1.Config(), split='test')": "split = 'test'",
        "packed_data(megatron_m1.Config())": "data.train of runs/m1 is empty",
        f"packed_data({str(tmp_path / 'empty')!r})": "has no complete one below checkpoints/",
    }
    lines = ["import megatron_m1"]
    for call in calls:
        lines += ["try:", f"    megatron_m1.{call}", "except ValueError as error:", "    print(error)"]
    modules, printed = imported_after(*lines)
    assert not modules & {"torch", "megatron.core", "transformers"}
    assert len(printed) == len(calls)
    for line, expected in zip(printed, calls.values(), strict=True):
        assert expected in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--prompt", "x"], "nothing does not exist"),
        (["RUN", "--prompt", "x", "--top-p", "2"], "top_p = 2.0"),
        (["RUN", "--prompt", "x"], "names no tokenizer: give --tokenizer"),
        (["RUN", "--prompt", "x", "--tokenizer", "gone.model"], "tokenizer gone.model does not exist"),
    ],
)
def test_generate_checks_before_it_imports_torch(tmp_path: Path, arguments: list[str], message: str) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text("preset: tiny\n")
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    words = [str(tmp_path) if word == "RUN" else word for word in arguments]
    modules, printed = imported_after(
        "from megatron_m1 import cli",
        "try:",
        f"    cli.run({['generate', *words]!r})",
        "except ValueError as error:",
        "    print(error)",
    )
    assert message in printed[0]
    assert not modules & {"torch", "megatron.core", "transformers"}


def test_there_is_one_version() -> None:
    command = [sys.executable, "setup.py", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert shown.split()[-1] == megatron_m1.__version__
