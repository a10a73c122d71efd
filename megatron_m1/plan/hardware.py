"""GPUs and the shares of their peaks that are assumed: ``hardware.yaml``, and a user's file over it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from megatron_m1.config.yaml_text import parse_yaml
from megatron_m1.printing import shown

OWN = Path(__file__).with_name("hardware.yaml")


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU; ``hardware.yaml`` explains the fields. None is what nobody said."""

    name: str
    bf16_tflops: float
    source: str
    memory_gib: float | None = None
    fp32_tflops: float | None = None
    nvlink_gb_s: float | None = None
    network_gb_s: float | None = None
    node: int | None = None


@dataclass(frozen=True)
class Assumed:
    """A share between 0 and 1, pessimistic and optimistic, and what it is of."""

    low: float
    high: float
    why: str


@dataclass(frozen=True)
class Hardware:
    """All that is known."""

    gpus: Mapping[str, Gpu]
    assumptions: Mapping[str, Assumed]

    def find(self, name: str) -> Gpu:
        """The GPU called ``name``, in small or capital letters, with everything that a plan needs.

        Raises:
            ValueError: none has that name, or something is not known of it.
        """
        names = {known.lower(): known for known in self.gpus}
        if name.lower() not in names:
            raise ValueError(
                f"nothing is known of a GPU {shown(name)}: choose from {', '.join(self.gpus)}, or describe it in a "
                "file, --hardware FILE.yaml"
            )
        gpu = self.gpus[names[name.lower()]]
        missing = [field.name for field in fields(gpu) if getattr(gpu, field.name) is None]
        if missing:
            raise ValueError(
                f"nothing says {', '.join(missing)} of GPU {gpu.name}: give them in a file, --hardware FILE.yaml"
            )
        return gpu


@cache
def own_hardware() -> Hardware:
    """What this package knows."""
    return _read(parse_yaml(OWN.read_text(encoding="utf-8")), OWN, Hardware({}, {}))


def load_hardware(file: Path | None) -> Hardware:
    """What this package knows, and over it what ``file`` says.

    Raises:
        ValueError: the file can't be read, or has a strange field or value; one line.
    """
    known = own_hardware()
    if file is None:
        return known
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--hardware {file} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"--hardware {file}: {' '.join(str(error).split())}") from error
    return _read(content, file, known)


def peak_bf16_flops(device_name: str) -> float | None:
    """Return the dense BF16 FLOP/s of a device as ``torch.cuda.get_device_name`` calls it, None if it is unknown.

    A CPU's peak is unknown to us: pass ``"cpu"`` and get None, so that no utilisation is reported.
    """
    words = device_name.replace("-", " ").split()
    # Of two names that fit, the more specific one.
    for gpu in sorted(own_hardware().gpus.values(), key=lambda gpu: -len(gpu.name.split())):
        if all(word in words for word in gpu.name.split()):
            return gpu.bf16_tflops * 1e12
    return None


def _read(content: Any, file: Path, known: Hardware) -> Hardware:
    groups = _mapping(content, f"{file}", ("gpus", "assumptions"))
    gpus, assumptions = dict(known.gpus), dict(known.assumptions)
    for name, values in _mapping(groups.get("gpus", {}), f"{file}: gpus").items():
        at = f"{file}: gpus.{name}"
        given = _mapping(values, at, tuple(field.name for field in fields(Gpu) if field.name != "name"))
        before = {key: value for key, value in vars(gpus[name]).items() if key != "name"} if name in gpus else {}
        merged = before | {key: _value(key, value, at) for key, value in given.items()}
        if absent := [key for key in ("bf16_tflops", "source") if key not in merged]:
            raise ValueError(f"{at} has no {absent[0]}: give it")
        gpus[name] = Gpu(name, **merged)
    for name, values in _mapping(groups.get("assumptions", {}), f"{file}: assumptions").items():
        at = f"{file}: assumptions.{name}"
        if known.assumptions and name not in known.assumptions:
            raise ValueError(f"{file}: assumptions has {name!r}: choose from {', '.join(known.assumptions)}")
        before = vars(assumptions[name]) if name in assumptions else {}
        given = _mapping(values, at, ("low", "high", "why"))
        assumed = Assumed(**before | {key: _value(key, value, at) for key, value in given.items()})
        if not assumed.low <= assumed.high <= 1:
            raise ValueError(f"{at} is {assumed.low} to {assumed.high}: give low and high, rising, up to 1")
        assumptions[name] = assumed
    return Hardware(gpus, assumptions)


def _mapping(content: Any, at: str, allowed: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{at} is {shown(content)}: give fields and their values")
    for name in content:
        if allowed and name not in allowed:
            raise ValueError(f"{at} has {shown(name)}: choose from {', '.join(allowed)}")
    return {str(name): value for name, value in content.items()}


def _value(name: str, value: Any, at: str) -> Any:
    if name in ("source", "why"):
        if not isinstance(value, str):
            raise ValueError(f"{at}.{name} is {shown(value)}: give a text")
        return value
    least = 0 if name in ("low", "high") else math.ulp(0.0)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < least or (name == "node" and value != int(value)):
        raise ValueError(f"{at}.{name} is {shown(value)}: give a number above 0")
    return int(value) if name == "node" else float(value)
