"""Compile the Triton kernels for GPUs that are not there, and report what the compiler made of them.

    python -m megatron_m1.kernels.triton_aot [--all] [--jobs 2]

prints one JSON object a configuration: registers, stack bytes (spills), shared memory, matrix instructions, seconds.
Where one breaks what ``faults`` asks for, that is said in the end, and the exit status is 1.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    def configuration(self) -> tuple[Any, ...]:
        """What of it was chosen, and not given by tensors and states: this is what ships."""
        chosen = {name: size for name, size in self.constants.items() if name.startswith("BLOCK") or name == "STAGES"}
        return self.kernel, self.capability, self.warps, *sorted(chosen.items())

    @property
    def multiplies(self) -> bool:
        """Whether it has matrix products: all walks but those of states alone."""
        return self.kernel == "walk" and (self.constants["QUERIES"] or self.constants["KEYS"])

    @property
    def name(self) -> str:
        """For people and tests."""
        return f"{self.kernel} {self.role} sm_{self.capability} {str(self.dtype)[6:]} {self.dims[0]}x{self.dims[1]}"


STATES = ("STATES_IN", "CARRIES_IN", "STATES_OUT")
_STATELESS = dict(
    REVERSE=False, QUERIES=True, KEYS=True, STATES_IN=False, CARRIES_IN=False, STATES_OUT=False,
    SILU_A=False, SILU_B=False, SILU_C=False, SILU_GRAD=False, TRANSPOSED=False,
)  # fmt: skip
_STATES_ALONE = dict(QUERIES=False, STATES_OUT=True)
_OF_STATES = dict(REVERSE=True, KEYS=False, STATES_IN=True)
ROLES: Mapping[str, Mapping[str, bool]] = {
    "o": {},
    "dq": dict(TRANSPOSED=True),
    "dk": dict(REVERSE=True, TRANSPOSED=True),
    "dv": dict(REVERSE=True),
    "silu o": dict(SILU_A=True, SILU_B=True, SILU_C=True),
    "silu dq": dict(TRANSPOSED=True, SILU_B=True, SILU_C=True, SILU_GRAD=True),
    "silu dk": dict(REVERSE=True, TRANSPOSED=True, SILU_A=True, SILU_C=True, SILU_GRAD=True),
    "silu dv": dict(REVERSE=True, SILU_A=True, SILU_B=True, SILU_GRAD=True),
    "states": _STATES_ALONE,
    "dq states": dict(**_STATES_ALONE, TRANSPOSED=True),
    "dv states": dict(**_STATES_ALONE, REVERSE=True),
    "silu o states": dict(**_STATES_ALONE, SILU_A=True, SILU_B=True, SILU_C=True),
    "silu dq states": dict(**_STATES_ALONE, TRANSPOSED=True, SILU_B=True, SILU_C=True),
    "silu dv states": dict(**_STATES_ALONE, REVERSE=True, SILU_A=True, SILU_B=True),
    "dv of states": _OF_STATES,
    "dk of states": dict(**_OF_STATES, TRANSPOSED=True),
    "states of states": _OF_STATES | dict(QUERIES=False, STATES_OUT=True),
}
"""What walks are compiled for, as a call without states has it: the four results, plain and through SiLU; the states of
segments that those walks need first; and the backward pass of ``lightning_state``, which reads states and no keys."""


def variants(role: str) -> list[dict[str, bool]]:
    """Every way in which ``triton_attention.py`` runs a role: with states that enter and leave, or without."""
    base = {**_STATELESS, **ROLES[role]}
    if role == "states of states":
        return [base]
    if not base["QUERIES"]:
        # The states of segments begin with the caller's; ``lightning_state`` adds carries, and has no others.
        extra = [{}] if "silu" in role else [{}, dict(STATES_IN=True)]
        return [base | more for more in ([*extra, dict(CARRIES_IN=True)] if role == "states" else extra)]
    states: list[dict[str, bool]] = [{}]
    if base["KEYS"] and "silu" not in role:
        leaving = (False, True) if role in ("o", "dv") else (False,)
        states = [dict(STATES_IN=i, STATES_OUT=o) for i, o in itertools.product((False, True), leaving)]
    return [base | more | dict(CARRIES_IN=carries) for more in states for carries in (False, True)]


def _configs(
    flags: Mapping[str, bool], capability: int, dtype: torch.dtype, dims: tuple[int, int]
) -> tuple[WalkConfig, ...]:
    return walk_configs(*dims, dtype, capability, (flags["SILU_A"], flags["SILU_B"], flags["SILU_C"]))


def walk_builds(
    roles: Iterable[str],
    capability: int,
    dtype: torch.dtype,
    dims: tuple[int, int],
    keep: Callable[[dict[str, bool]], bool],
) -> Iterator[Build]:
    """The walk for states ``dims``, in those variants of some roles that ``keep`` takes, in every configuration."""
    for role in roles:
        for flags in filter(keep, variants(role)):
            given = "".join(f" +{name.lower()}" for name in STATES if flags[name] and not ROLES[role].get(name))
            for choice, config in enumerate(_configs(flags, capability, dtype, dims)):
                constants: dict[str, int] = {name: value for name, value in flags.items() if name != "TRANSPOSED"}
                constants |= dict(
                    A=dims[0], C=dims[1], BLOCK_T=config.block_t, BLOCK_A=config.block_a, BLOCK_C=config.block_c,
                    STAGES=config.stages,
                )  # fmt: skip
                constants["stride_a" if flags["TRANSPOSED"] else "stride_c"] = 1
                name = f"{role}{given}{', slim' if choice else ''}"
                yield Build("walk", name, capability, dtype, dims, constants, config.warps)


def _bare(flags: dict[str, bool]) -> bool:
    """No states come and go but those that a role is about."""
    leaving = flags["QUERIES"] and flags["STATES_OUT"]
    return not (flags["CARRIES_IN"] or leaving or (flags["KEYS"] and flags["STATES_IN"]))


def _silu(flags: dict[str, bool]) -> bool:
    return flags["SILU_B"] or flags["SILU_C"] or flags["SILU_A"]


def _every(flags: dict[str, bool]) -> bool:
    return True


def _others(capability: int, dtype: torch.dtype) -> Iterator[Build]:
    row = dict(HEAD=128, WIDTH=8192, BLOCK=8192)
    yield Build("chain", "states", capability, torch.float32, (128, 128), dict(SIZE=128 * 128, BLOCK=1024), 4)
    step = dict(A=128, C=128, BLOCK_A=128, BLOCK_C=triton_step.COLUMNS)
    yield Build("step", "decode", capability, dtype, (128, 128), step, 4)
    rows = row | dict(ROWS=triton_norm.ROWS_PER_PROGRAM)
    # Alone in one pass; between ranks a pass for the sum, and one with it.
    for role, summed, results in (("norm", False, True), ("norm's sum", False, False), ("norm of ranks", True, True)):
        forward = row | dict(SUMMED=summed, NORMALISE=results)
        yield Build("forward_row", role, capability, dtype, (64, 128), forward, triton_norm.FORWARD_WARPS)
        backward = rows | dict(PROJECTED=summed, DIFFERENTIATE=results)
        yield Build("backward_rows", role, capability, dtype, (64, 128), backward, triton_norm.BACKWARD_WARPS)


def quick_builds() -> list[Build]:
    """A configuration of each kernel for each architecture, and every one of sm_90 in bfloat16 with D = 128, as a
    training step runs them: without the caller's states, and the walks through SiLU also with carries."""
    bf16, dims = torch.bfloat16, (128, 128)
    builds = [build for capability in (80, 100) for build in walk_builds(["o"], capability, bf16, dims, _bare)]
    builds += walk_builds(ROLES, 90, bf16, dims, lambda flags: _bare(flags) or (_silu(flags) and flags["CARRIES_IN"]))
    alone = [build for capability in (80, 100) for build in _others(capability, bf16) if "ranks" not in build.role]
    return [*builds, *alone, *_others(90, bf16)]


def all_builds() -> list[Build]:
    """Every variant that can run, 16 bits and D of 64 and 128; of other head dims and of float32, those without
    states, which need most registers next to those with them."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    results = [role for role in ROLES if "states" not in role]
    builds: list[Build] = []
    for capability in CAPABILITIES:
        for dtype, width in itertools.product((bf16, fp16), (128, 64)):
            builds += walk_builds(ROLES, capability, dtype, (width, width), _every)
        for dims in ((64, 128), (128, 64)):
            builds += walk_builds(["o", "dq", "dk", "dv", "states"], capability, bf16, dims, _bare)
        for dtype, width in ((bf16, 256), (fp16, 256), (fp32, 64), (fp32, 128), (fp32, 256)):
            builds += walk_builds(results, capability, dtype, (width, width), _bare)
        for dtype in (bf16, fp16, fp32):
            builds += _others(capability, dtype)
    return list({build.name: build for build in builds}.values())


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
        # Long documents are cut, and carries made, where heads are too few to fill the GPU: 16 need not divide them.
        few = name == "heads" and (build.constants.get("CARRIES_IN") or not build.constants.get("QUERIES", True))
        if signature[name] != "fp32" and name != "rows" and not few:
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
        "multiplies": build.multiplies,
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
        if result["multiplies"] and result["matrix_instructions"] == 0:
            found.append(f"no {MATRIX_INSTRUCTIONS[capability]}")
        if result["stack"] > 0:
            found.append(f"spills {result['stack']} bytes")
    return [f"{result['name']}: {fault}" for fault in found]


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--all", action="store_true", help="every configuration that ships, in every variant that runs")
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
