"""Lightning attention by the Triton kernels of ``triton_walk.py``: what is launched, forward and backward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_m1.kernels.lightning.segments import NONE, Plan, plan_walk, rows_of, segment_tokens
from megatron_m1.kernels.lightning.triton_config import NO_SILU, Silu, WalkConfig, walk_config
from megatron_m1.kernels.lightning.triton_walk import chain, walk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHAIN_BLOCK = 1024
MAX_WIDTH = 256


@dataclass(frozen=True)
class Documents:
    """The documents of a pack, and the slots of the states they begin with and leave."""

    bounds: Sequence[int]
    initial: Sequence[int]
    final: Sequence[int]
    segment_tokens: int | None = None
    """The longest segment that one program walks; None chooses by the GPU."""

    @property
    def states_kept(self) -> int:
        """Final states to be written."""
        return sum(slot != NONE for slot in self.final)

    def plan(self, walk: "Walk", reverse: bool, only_kept: bool = False) -> Plan:
        """Cut the pack for ``walk``."""
        most = self.segment_tokens
        if most is None:
            processors = _processors(walk.c.device)
            most = segment_tokens(self.bounds[-1], walk.programs, processors, walk.config.block_t)
        states = (self.final, self.initial) if reverse else (self.initial, self.final)
        return plan_walk(self.bounds, *states, most, reverse, only_kept)


def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; 1 where Triton's interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _capability(device: torch.device) -> int:
    """10 x major + minor; the interpreter takes what an H100 would."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@dataclass(frozen=True)
class Walk:
    """One direction over a pack: which tensors take which part, see ``triton_walk.py``."""

    a: Tensor
    """[T, H, A], the queries' part."""
    b: Tensor
    """[T, H, A], the keys' part."""
    c: Tensor
    """[T, H, C], the values' part."""
    slopes: Tensor
    reverse: bool = False
    transposed: bool = False
    """States are [N, H, C, A] in memory, as seen from this walk."""
    silu: Silu = NO_SILU
    """Take a, b, c through SiLU."""

    @property
    def sizes(self) -> tuple[int, int]:
        """A and C."""
        return self.b.shape[2], self.c.shape[2]

    @property
    def config(self) -> WalkConfig:
        """How the kernel is compiled for these tensors."""
        return walk_config(*self.sizes, self.c.dtype, _capability(self.c.device), self.silu)

    @property
    def programs(self) -> int:
        """Programs that walk one segment."""
        return self.c.shape[1] * triton.cdiv(self.sizes[1], self.config.block_c)

    def launch(
        self,
        segments: Tensor,
        output: Tensor | None,
        state_in: Tensor | None,
        carry_in: Tensor | None,
        state_out: Tensor | None,
        *,
        keys: bool = True,
        raw: Tensor | None = None,
    ) -> None:
        """Write ``output`` [T, H, C], times SiLU's derivative at ``raw``, and ``state_out`` of ``segments`` [S, 5]."""
        (width_a, width_c), heads, config = self.sizes, self.c.shape[1], self.config
        unused = self.slopes
        rows = [self.a, self.b, self.c, unused if output is None else output, unused if raw is None else raw]
        # Strides by token and by head of each; what is unused has one dimension, so it gets zeros.
        strides = [stride for x in rows for stride in (x.stride()[:2] if x.dim() == 3 else (0, 0))]
        states = [unused if x is None else x for x in (state_in, carry_in, state_out)]
        state_strides = (1, width_a) if self.transposed else (width_c, 1)
        walk[(self.programs, segments.shape[0])](
            *rows, self.slopes, segments, *states, heads, *strides, *state_strides,
            A=width_a, C=width_c, BLOCK_T=config.block_t, BLOCK_A=config.block_a, BLOCK_C=config.block_c,
            REVERSE=self.reverse, QUERIES=output is not None, KEYS=keys,
            STATES_IN=state_in is not None, CARRIES_IN=carry_in is not None, STATES_OUT=state_out is not None,
            SILU_A=self.silu[0], SILU_B=self.silu[1], SILU_C=self.silu[2], SILU_GRAD=raw is not None,
            PRECISION=config.precision, STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip

    def carries(self, plan: Plan, state_in: Tensor | None, keys: bool = True) -> Tensor | None:
        """States entering the later segments of documents cut in several, [M, H, ...] as the caller's states."""
        if not plan.carries:
            return None
        shape = self.sizes[::-1] if self.transposed else self.sizes
        carries = torch.empty(
            len(plan.carries), self.c.shape[1], *shape, dtype=torch.float32, device=self.slopes.device
        )
        table = _table(plan.carries, self.slopes.device)
        self.launch(table, None, state_in, None, carries, keys=keys)
        chains = torch.tensor(plan.chains, dtype=torch.int32, device=carries.device)
        size = shape[0] * shape[1]
        grid = (triton.cdiv(size, CHAIN_BLOCK), carries.shape[1], len(plan.chains))
        chain[grid](carries, self.slopes, table, chains, carries.shape[1], SIZE=size, BLOCK=CHAIN_BLOCK)
        return carries


def _table(segments: Any, device: torch.device) -> Tensor:
    """[S, 5] int32 on ``device``."""
    return torch.tensor(list(rows_of(segments)), dtype=torch.int32).to(device, non_blocking=True)


def dense_rows(x: Tensor) -> Tensor:
    """``x`` [T, H, D] itself if its last dimension is dense, as the kernels read it."""
    return x if x.stride(2) == 1 else x.contiguous()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None,
    documents: Documents,
    silu: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output, and the final states if any document keeps its own."""
    output = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    kept = documents.states_kept
    final_state = None
    if kept:
        final_state = torch.empty(kept, *k.shape[1:], v.shape[2], dtype=torch.float32, device=v.device)
    walk_o = Walk(q, k, v, slopes, silu=(silu, silu, silu))
    plan = documents.plan(walk_o, reverse=False)
    carries = walk_o.carries(plan, initial_state)
    walk_o.launch(_table(plan.segments, v.device), output, initial_state, carries, final_state)
    return output, final_state


def _backward(
    inputs: tuple[Tensor, Tensor, Tensor],
    slopes: Tensor,
    initial_state: Tensor | None,
    documents: Documents,
    silu: bool,
    grad_output: Tensor,
    grad_final: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor],
) -> Tensor | None:
    """Write the gradients of q, k, v to ``outputs``; return that of the initial states."""
    (q, k, v), (dq, dk, dv) = inputs, outputs
    walk_q = Walk(grad_output, v, k, slopes, transposed=True, silu=(False, silu, silu))
    plan = documents.plan(walk_q, reverse=False)
    carries = walk_q.carries(plan, initial_state)
    table = _table(plan.segments, q.device)
    walk_q.launch(table, dq, initial_state, carries, None, raw=q if silu else None)

    grad_initial = None
    if initial_state is not None:
        read = sum(slot != NONE for slot in documents.initial)
        make = torch.empty_like if read == initial_state.shape[0] else torch.zeros_like
        grad_initial = make(initial_state, memory_format=torch.contiguous_format)
    walk_v = Walk(k, q, grad_output, slopes, reverse=True, silu=(silu, silu, False))
    walk_k = Walk(v, grad_output, q, slopes, reverse=True, transposed=True, silu=(silu, False, silu))
    plan = documents.plan(walk_v, reverse=True)
    carries = walk_v.carries(plan, grad_final)
    table = _table(plan.segments, q.device)
    walk_v.launch(table, dv, grad_final, carries, grad_initial, raw=v if silu else None)
    walk_k.launch(table, dk, grad_final, carries, None, raw=k if silu else None)
    return grad_initial


class _Attention(torch.autograd.Function):
    """Keeps only its inputs."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, initial_state: Tensor | None, documents: Documents
    ) -> tuple[Tensor, Tensor | None]:
        """Output [T, H, Dv] and final states."""
        ctx.save_for_backward(q, k, v, slopes, initial_state)
        ctx.documents = documents
        ctx.set_materialize_grads(False)
        with torch.cuda.device_of(q):
            return _forward(q, k, v, slopes, initial_state, documents, silu=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and the initial states."""
        q, k, v, slopes, initial_state = ctx.saved_tensors
        grad_output = torch.zeros_like(v) if grads[0] is None else dense_rows(grads[0])
        grad_final = None if grads[1] is None else grads[1].contiguous()
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        with torch.cuda.device_of(q):
            grad_initial = _backward(
                (q, k, v), slopes, initial_state, ctx.documents, False, grad_output, grad_final, (dq, dk, dv)
            )
        return dq, dk, dv, None, grad_initial, None


class _SiluAttention(torch.autograd.Function):
    """Attention of SiLU(q), SiLU(k), SiLU(v), which with what rides along are one tensor; so are their gradients."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, slopes: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
        """[T, H, P, D] -> the output [T, H, D], and the parts after q, k, v as a view [T, H, P - 3, D]."""
        ctx.save_for_backward(parts, slopes)
        ctx.documents = documents
        q, k, v = parts[:, :, :3].unbind(2)
        with torch.cuda.device_of(parts):
            output, _ = _forward(q, k, v, slopes, None, documents, silu=True)
        return output, parts[:, :, 3:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of ``parts``."""
        parts, slopes = ctx.saved_tensors
        grad = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
        grad[:, :, 3:] = grads[1]
        q, k, v = parts[:, :, :3].unbind(2)
        dq, dk, dv = grad[:, :, :3].unbind(2)
        with torch.cuda.device_of(parts):
            _backward((q, k, v), slopes, None, ctx.documents, True, dense_rows(grads[0]), None, (dq, dk, dv))
        return grad, None, None


def check_triton(x: Tensor, *widths: int) -> None:
    """Check that the kernels take ``x``'s dtype and device, and head dims ``widths``.

    Raises:
        ValueError: float64, a head dim above 256, or a device that is no GPU (Triton's interpreter takes CPU tensors).
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"the triton backend has no {x.dtype}: give float32, bfloat16 or float16, or backend='chunk'")
    if max(widths) > MAX_WIDTH:
        raise ValueError(f"head dims {widths}: the triton backend takes at most {MAX_WIDTH}, backend='chunk' any")
    if x.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"the triton backend needs a GPU, but the inputs are on {x.device}: use backend='chunk'")


def triton_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Sequence[int],
    initial_state: Tensor | None,
    output_final_state: bool,
    *,
    initial_index: Sequence[int] | None = None,
    final_index: Sequence[int] | None = None,
    segment_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the kernels; arguments as in ``lightning_attention`` and ``selected.py``, already checked.

    Args:
        segment_tokens: the most tokens that one program walks; default by the GPU, see ``segments.segment_tokens``.

    Returns:
        The output [T, H, Dv] in v's dtype; the final states in float32, or None.

    Raises:
        ValueError: see ``check_triton``.
    """
    check_triton(q, q.shape[2], v.shape[2])
    everyone, nobody = range(len(cu_seqlens) - 1), [NONE] * (len(cu_seqlens) - 1)
    if initial_index is None:
        initial_index = nobody if initial_state is None else everyone
    if final_index is None:
        final_index = everyone
    documents = Documents(cu_seqlens, initial_index, final_index if output_final_state else nobody, segment_tokens)
    state = None if initial_state is None else initial_state.contiguous()
    result: tuple[Tensor, Tensor | None] = _Attention.apply(
        dense_rows(q), dense_rows(k), dense_rows(v), slopes.float().contiguous(), state, documents
    )
    return result


def triton_silu_attention(
    parts: Tensor, slopes: Tensor, cu_seqlens: Sequence[int], *, segment_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of SiLU(q), SiLU(k), SiLU(v) out of ``parts`` [T, H, P, D]; see ``fused.silu_lightning_attention``."""
    check_triton(parts, parts.shape[3])
    nobody = [NONE] * (len(cu_seqlens) - 1)
    documents = Documents(cu_seqlens, nobody, nobody, segment_tokens)
    result: tuple[Tensor, Tensor] = _SiluAttention.apply(
        parts if parts.stride(3) == 1 else parts.contiguous(), slopes.float().contiguous(), documents
    )
    return result


class _State(torch.autograd.Function):
    """The states that tokens alone leave."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, slopes: Tensor, documents: Documents) -> Tensor:
        """[K, H, Dk, Dv]."""
        ctx.save_for_backward(k, v, slopes)
        ctx.documents = documents
        states = torch.empty(documents.states_kept, *k.shape[1:], v.shape[2], dtype=torch.float32, device=k.device)
        walk_s = Walk(k, k, v, slopes)
        plan = documents.plan(walk_s, reverse=False, only_kept=True)
        with torch.cuda.device_of(k):
            carries = walk_s.carries(plan, None)
            walk_s.launch(_table(plan.segments, k.device), None, None, carries, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of k and v: zero in documents whose state was not asked for."""
        k, v, slopes = ctx.saved_tensors
        dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        grad = grads[0].contiguous()
        walk_v = Walk(k, k, v, slopes, reverse=True)
        walk_k = Walk(v, v, k, slopes, reverse=True, transposed=True)
        with torch.cuda.device_of(k):
            for walk_x, output in ((walk_v, dv), (walk_k, dk)):
                plan = ctx.documents.plan(walk_x, reverse=True)
                carries = walk_x.carries(plan, grad, keys=False)
                walk_x.launch(_table(plan.segments, k.device), output, grad, carries, None, keys=False)
        return dk, dv, None, None


def triton_lightning_state(
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Sequence[int],
    final_index: Sequence[int],
    *,
    segment_tokens: int | None = None,
) -> Tensor:
    """Run the kernels; arguments and result as in ``selected.lightning_state``, already checked."""
    check_triton(k, k.shape[2], v.shape[2])
    documents = Documents(cu_seqlens, [NONE] * len(final_index), final_index, segment_tokens)
    result: Tensor = _State.apply(dense_rows(k), dense_rows(v), slopes.float().contiguous(), documents)
    return result
