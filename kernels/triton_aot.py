"""Compile the Triton kernels for GPUs that are not there, and report what the compiler made of them.

    python -m megatron_m1.kernels.triton_aot [--all] [--jobs 2]

prints one JSON object a configuration: registers, stack bytes (spills), shared memory, matrix instructions, seconds.
Where one breaks what ``faults`` asks for, that is said in the end, and the exit status is 1.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_m1.kernels.lightning import triton_step, triton_walk
from megatron_m1.kernels.lightning.triton_config import WalkConfig, walk_configs
from megatron_m1.kernels.rmsnorm import triton_norm

CAPABILITIES = (80, 90, 100)
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
INPUTS = {"a", "b", "c", "o", "raw", "q", "k", "v", "x", "y", "weight", "gate", "grad", "grad_x", "grad_gate"}
FLOATS = {"slopes", "state", "new_state", "state_in", "carry_in", "state_out", "carries"}
FLOATS |= {"total", "projection", "grad_weight"}
MATRIX_INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What one program may have (CUDA programming guide, technical specifications per compute capability)."""


@dataclass(frozen=True)
class Build:
    """One kernel, compiled one way."""

    kernel: str
    role: str
    capability: int
    dtype: torch.dtype
    dims: tuple[int, int]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 8

    @property
    def name(self) -> str:
        """For people and tests."""
        return f"{self.kernel} {self.role} sm_{self.capability} {str(self.dtype)[6:]} {self.dims[0]}x{self.dims[1]}"


_PLAIN = dict(
    REVERSE=False, QUERIES=True, KEYS=True, STATES_IN=True, CARRIES_IN=True, STATES_OUT=True,
    SILU_A=False, SILU_B=False, SILU_C=False, SILU_GRAD=False,
)  # fmt: skip
_SILU = dict(STATES_IN=False, STATES_OUT=False)
ROLES: dict[str, dict[str, bool]] = {
    "output": {},
    "reverse": dict(REVERSE=True),
    "states": dict(QUERIES=False, CARRIES_IN=False),
    "silu output": dict(**_SILU, SILU_A=True, SILU_B=True, SILU_C=True),
    "silu dq": dict(**_SILU, SILU_B=True, SILU_C=True, SILU_GRAD=True),
    "silu dk": dict(**_SILU, REVERSE=True, SILU_A=True, SILU_C=True, SILU_GRAD=True),
    "silu dv": dict(**_SILU, REVERSE=True, SILU_A=True, SILU_B=True, SILU_GRAD=True),
}
"""What the walk is compiled for; dq without SiLU is "output", dk and dv are "reverse"."""


def _configs(role: str, capability: int, dtype: torch.dtype, width_a: int, width_c: int) -> tuple[WalkConfig, ...]:
    flags = _PLAIN | ROLES[role]
    silu = (flags["SILU_A"], flags["SILU_B"], flags["SILU_C"])
    return walk_configs(width_a, width_c, dtype, capability, silu)


def walk_build(role: str, capability: int, dtype: torch.dtype, width_a: int, width_c: int, choice: int = 0) -> Build:
    """The walk in a role, in one of the configurations that ship."""
    config = _configs(role, capability, dtype, width_a, width_c)[choice]
    constants = _PLAIN | ROLES[role] | dict(
        A=width_a, C=width_c, BLOCK_T=config.block_t, BLOCK_A=config.block_a, BLOCK_C=config.block_c,
        STAGES=config.stages, stride_c=1,
    )  # fmt: skip
    name = f"{role}, slim" if choice else role
    return Build("walk", name, capability, dtype, (width_a, width_c), constants, config.warps)


def _others(capability: int) -> Iterator[Build]:
    bf16 = torch.bfloat16
    row = dict(HEAD=128, WIDTH=8192, BLOCK=8192)
    yield Build("chain", "states", capability, torch.float32, (128, 128), dict(SIZE=128 * 128, BLOCK=1024), 4)
    step = dict(A=128, C=128, BLOCK_A=128, BLOCK_C=triton_step.COLUMNS)
    yield Build("step", "decode", capability, bf16, (128, 128), step, 4)
    forward = dict(**row, SUMMED=False, NORMALISE=True)
    yield Build("forward_row", "norm", capability, bf16, (64, 128), forward, triton_norm.FORWARD_WARPS)
    backward = dict(**row, ROWS=triton_norm.ROWS_PER_PROGRAM, PROJECTED=False, DIFFERENTIATE=True)
    yield Build("backward_rows", "norm", capability, bf16, (64, 128), backward, triton_norm.BACKWARD_WARPS)


def _hopper_builds() -> Iterator[Build]:
    """Everything of the walk for sm_90, bfloat16, D = 128: all roles in all configurations."""
    for role in ROLES:
        for choice in range(len(_configs(role, 90, torch.bfloat16, 128, 128))):
            yield walk_build(role, 90, torch.bfloat16, 128, 128, choice)


def quick_builds() -> list[Build]:
    """One configuration per kernel and architecture, and all of sm_90 in bfloat16 with D = 128."""
    builds = [walk_build("output", capability, torch.bfloat16, 128, 128) for capability in (80, 100)]
    return [*builds, *_hopper_builds(), *(build for capability in CAPABILITIES for build in _others(capability))]


def all_builds() -> list[Build]:
    """The 40 that stand for what ships: the quick ones, and of other head dims and dtypes what needs most registers."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    builds = quick_builds()
    builds += [walk_build(role, c, bf16, 128, 128) for role in ("silu output", "silu dv") for c in (80, 100)]
    builds += [walk_build("output", c, bf16, 64, 64) for c in CAPABILITIES]
    builds += [walk_build("output", c, bf16, 256, 256) for c in CAPABILITIES]
    builds += [walk_build("output", c, fp32, 256, 256) for c in CAPABILITIES]
    return [*builds, walk_build("silu dv", 90, fp16, 128, 128)]


def _kernel(name: str) -> Any:
    for module in (triton_walk, triton_step, triton_norm):
        if hasattr(module, name):
            return getattr(module, name)
    raise KeyError(name)


def _source(build: Build) -> ASTSource:
    kernel = _kernel(build.kernel)
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in build.constants:
            signature[name] = "constexpr"
            continue
        if name in INPUTS:
            signature[name] = TYPES[build.dtype]
        elif name in ("table", "chains"):
            signature[name] = "*i32"
        elif name in FLOATS:
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
        if signature[name] != "fp32" and name != "rows":
            aligned[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, build.constants, aligned)


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and stack bytes a thread, from the tool that Triton carries."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return {"registers": int(found[1]), "stack": int(found[2])}


def compile_build(build: Build) -> dict[str, Any]:
    """Compile, and what came out."""
    start = time.perf_counter()
    target = GPUTarget("cuda", build.capability, 32)
    compiled = triton.compile(_source(build), target=target, options={"num_warps": build.warps})
    ptx = compiled.asm["ptx"]
    return {
        "name": build.name,
        "kernel": build.kernel,
        "role": build.role,
        "capability": build.capability,
        "dtype": str(build.dtype),
        "dims": build.dims,
        "shared": compiled.metadata.shared,
        **_resources(compiled.asm["cubin"]),
        "matrix_instructions": ptx.count(MATRIX_INSTRUCTIONS[build.capability]),
        "seconds": round(time.perf_counter() - start, 1),
    }


def faults(result: dict[str, Any]) -> list[str]:
    """What is wrong with something compiled: every kernel must fit the chip's shared memory, and the walk over 16-bit
    heads of up to 128 must use the chip's own matrix instructions and not spill."""
    found = []
    capability = result["capability"]
    if result["shared"] > SHARED_BYTES[capability]:
        found.append(f"{result['shared']} bytes of shared memory")
    if result["kernel"] == "walk" and result["dtype"] != "torch.float32" and max(result["dims"]) <= 128:
        if result["matrix_instructions"] == 0:
            found.append(f"no {MATRIX_INSTRUCTIONS[capability]}")
        if result["stack"] > 0:
            found.append(f"spills {result['stack']} bytes")
    return [f"{result['name']}: {fault}" for fault in found]


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--all", action="store_true", help="every configuration that ships")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: unset it, the interpreter's kernels can't be compiled")
    builds = all_builds() if arguments.all else quick_builds()
    found = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for result in pool.map(compile_build, builds):
            print(json.dumps(result), flush=True)
            found += faults(result)
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
