"""The index of a checkpoint read without torch: the same as with it, and no more trusting."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as torch_checkpoint

from megatron_m1.checkpoint import metadata_file
from megatron_m1.checkpoint.metadata import read_metadata
from megatron_m1.checkpoint.metadata_file import DTYPES, PlainTensor, tensors_of


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two tensors, a scalar and an object, as torch itself writes them."""
    state = {
        "weight": torch.ones(3, 5, dtype=torch.bfloat16),
        "bias": torch.ones(7),
        "step": torch.tensor(3),
        "empty": torch.ones(0, 4),
        "extra": {"a": [1, "text"]},
    }
    torch_checkpoint.save(state, checkpoint_id=tmp_path / "step_1", no_dist=True)
    return tmp_path / "step_1"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_read_is_what_torch_reads(checkpoint: Path) -> None:
    ours, theirs = tensors_of(checkpoint), read_metadata(checkpoint).state_dict_metadata
    assert list(ours) == ["bias", "empty", "step", "weight"]
    for name, tensor in ours.items():
        stored = theirs[name]
        assert isinstance(stored, torch_checkpoint.metadata.TensorStorageMetadata)
        assert (tensor.size, tensor.properties.dtype.name) == (tuple(stored.size), str(stored.properties.dtype)[6:])


def test_dtypes_are_torchs() -> None:
    for name, dtype in DTYPES.items():
        assert getattr(torch, name).itemsize == dtype.itemsize, name
    known = {str(value)[6:] for value in vars(torch).values() if isinstance(value, torch.dtype)}
    # What no tensor of a model is stored as: quantised, opaque and sub-byte kinds.
    assert [
        n for n in sorted(known - DTYPES.keys()) if not n.startswith(("bits", "q", "uint", "int", "bcomplex", "bit"))
    ] == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("read", [tensors_of, read_metadata])
def test_a_pickle_runs_nothing(checkpoint: Path, tmp_path: Path, read: Callable[[Path], object]) -> None:
    class Shell:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'marker'}",)

    (checkpoint / ".metadata").write_bytes(pickle.dumps(Shell()))
    with pytest.raises(ValueError, match=r"is refused: \.metadata: it wants posix\.system"):
        read(checkpoint)
    assert not (tmp_path / "marker").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("attribute", ["size", "__setstate__", "__class__"])
def test_a_pickle_changes_no_class_for_whoever_is_read_next(checkpoint: Path, attribute: str) -> None:
    whole = (checkpoint / ".metadata").read_bytes()
    # The class itself, and for its state: no attributes, and slots with a name and a value.
    named = attribute.encode()
    code = b"\x80\x02ctorch.distributed.checkpoint.metadata\nTensorStorageMetadata\n"
    code += b"N}X" + len(named).to_bytes(4, "little") + named + b"K\x05s\x86b."
    (checkpoint / ".metadata").write_bytes(code)
    with pytest.raises(ValueError, match="can't be read"):
        tensors_of(checkpoint)
    (checkpoint / ".metadata").write_bytes(whole)
    assert tensors_of(checkpoint)["weight"].size == (3, 5)
    # Nor a dtype, which all tensors share.
    code = b"\x80\x02ctorch\nfloat32\nN}X\x08\x00\x00\x00itemsizeK\x00s\x86b."
    (checkpoint / ".metadata").write_bytes(code)
    with pytest.raises(ValueError, match="can't be read"):
        tensors_of(checkpoint)
    assert DTYPES["float32"].itemsize == 4
    assert not hasattr(PlainTensor, "size")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_it_takes_no_torch(checkpoint: Path) -> None:
    code = f"import sys\nfrom pathlib import Path\nfrom {metadata_file.__name__} import tensors_of\n"
    code += f"print(len(tensors_of(Path({str(checkpoint)!r}))), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "4 False\n"
