"""Lightning attention by chunks of the pack, in torch: linear in tokens, all work in matrix products.

The pack is cut every ``CHUNK_SIZE`` tokens, whatever its documents are, so nothing is padded and nothing is gathered.
Inside a chunk of m tokens, with D_rc = exp(-s (r - c)) where r >= c and r, c belong to one document,

    O = ((Q K^T) * D) V

and a document that enters the chunk with a state S, or leaves it with one, adds for its *piece* of n tokens

    O_r += exp(-s (r + 1)) q_r S             r = 0 .. n-1 within the piece
    S'   = exp(-s n) S + sum_c exp(-s (n - 1 - c)) k_c^T v_c

Only exponents <= 0 are ever exponentiated. README.md derives the backward formulas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_m1.kernels.lightning.call import Call
from megatron_m1.kernels.lightning.naive import state_dtype

CHUNK_SIZE = 64


@dataclass(frozen=True)
class Piece:
    """The tokens [start, end) of a chunk, counted from the chunk's start, that belong to one document."""

    start: int
    end: int
    is_first: bool
    """The document begins with this piece."""
    is_last: bool
    """The document ends with this piece."""
    document: int
    """Its number in the pack, from 0."""


@dataclass(frozen=True)
class Chunk:
    """The tokens [start, end) of the pack, and the pieces of documents in it, in order."""

    start: int
    end: int
    pieces: tuple[Piece, ...]


def cut_into_chunks(cu_seqlens: Sequence[int], chunk_size: int) -> list[Chunk]:
    """Cut a pack every ``chunk_size`` tokens and list each chunk's pieces of documents."""
    chunks, document = [], 0
    for start in range(0, cu_seqlens[-1], chunk_size):
        end = min(start + chunk_size, cu_seqlens[-1])
        pieces, at = [], start
        while at < end:
            begins, ends = cu_seqlens[document], cu_seqlens[document + 1]
            stop = min(end, ends)
            pieces.append(Piece(at - start, stop - start, at == begins, stop == ends, document))
            document += stop == ends
            at = stop
        chunks.append(Chunk(start, end, tuple(pieces)))
    return chunks


class Decays:
    """The powers of exp(-slope) that chunks of at most ``chunk_size`` tokens need, all in [0, 1]."""

    def __init__(self, slopes: Tensor, chunk_size: int, dtype: torch.dtype) -> None:
        rates = -slopes.to(dtype)[:, None]  # [H, 1]
        steps = torch.arange(chunk_size + 1, device=slopes.device, dtype=dtype)
        powers = torch.exp(rates * steps)  # [H, C + 1]
        lag = steps[:-1, None] - steps[None, :-1]  # [C, C]
        self._entering = powers[:, 1:, None]  # [H, C, 1]
        self._leaving = powers[:, :-1, None].flip(1)  # [H, C, 1]
        self._intra = torch.exp(rates[..., None] * lag.clamp(min=0)).mul_(lag >= 0)  # [H, C, C]

    def entering(self, length: int) -> Tensor:
        """exp(-s (r + 1)) for r in [0, length): [H, length, 1]."""
        return self._entering[:, :length]

    def leaving(self, length: int) -> Tensor:
        """exp(-s (length - 1 - c)) for c in [0, length): [H, length, 1]."""
        return self._leaving[:, self._leaving.shape[1] - length :]

    def over(self, length: int) -> Tensor:
        """exp(-s length): [H, 1, 1]."""
        return self._entering[:, length - 1 : length]

    def within(self, chunk: Chunk) -> Tensor:
        """D of a chunk of m tokens: [H, m, m]."""
        size = chunk.end - chunk.start
        decay = self._intra[:, :size, :size]
        if len(chunk.pieces) == 1:
            return decay
        starts = [piece.start for piece in chunk.pieces for _ in range(piece.start, piece.end)]
        columns = torch.arange(size, device=decay.device)
        same_document = columns >= torch.tensor(starts, device=decay.device)[:, None]  # [m, m], given r >= c
        return decay * same_document


def _head_major(x: Tensor, chunk: Chunk, dtype: torch.dtype) -> Tensor:
    return x[chunk.start : chunk.end].transpose(0, 1).to(dtype)  # [T, H, D] -> [H, m, D]


def _leaving_state(k: Tensor, v: Tensor, piece: Piece, entering: Tensor | None, decays: Decays) -> Tensor:
    """The state [H, Dk, Dv] after a piece; k, v [H, m, D] are those of its whole chunk."""
    length = piece.end - piece.start
    decayed_k = k[:, piece.start : piece.end] * decays.leaving(length)
    state = decayed_k.mT @ v[:, piece.start : piece.end]
    return state if entering is None else state.addcmul_(entering, decays.over(length))


def _state_entering(piece: Piece, carried: Tensor | None, initial_state: Tensor | None) -> Tensor | None:
    """The state [H, Dk, Dv] with which a piece begins, ``carried`` being the one before it; None where it is zero."""
    if not piece.is_first:
        return carried
    return None if initial_state is None else initial_state[piece.document]


class _ChunkLightningAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        initial_state: Tensor | None,
        chunks: list[Chunk],
        output_final_state: bool,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = state_dtype(q.dtype)
        decays = Decays(slopes, chunk_size, dtype)
        output = torch.empty_like(v, memory_format=torch.contiguous_format)  # [T, H, Dv]
        final_state = None
        if output_final_state:
            documents = chunks[-1].pieces[-1].document + 1
            final_state = output.new_empty((documents, q.shape[1], q.shape[2], v.shape[2]), dtype=dtype)
        state: Tensor | None = None
        for chunk in chunks:
            q_chunk, k_chunk, v_chunk = (_head_major(x, chunk, dtype) for x in (q, k, v))
            scores = (q_chunk @ k_chunk.mT).mul_(decays.within(chunk))  # [H, m, m]
            o_chunk = scores @ v_chunk  # [H, m, Dv]
            for piece in chunk.pieces:
                rows = slice(piece.start, piece.end)
                state = _state_entering(piece, state, initial_state)
                if state is not None:
                    o_chunk[:, rows].baddbmm_(q_chunk[:, rows] * decays.entering(piece.end - piece.start), state)
                if final_state is not None or not piece.is_last:
                    state = _leaving_state(k_chunk, v_chunk, piece, state, decays)
                    if final_state is not None and piece.is_last:
                        final_state[piece.document] = state
            output[chunk.start : chunk.end] = o_chunk.transpose(0, 1)  # [H, m, Dv] -> [m, H, Dv]
        ctx.save_for_backward(q, k, v, slopes, initial_state)
        ctx.chunks, ctx.chunk_size = chunks, chunk_size
        ctx.set_materialize_grads(False)
        return output, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return _gradients(ctx, grads)


def _gradients(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    q, k, v, slopes, initial_state = ctx.saved_tensors
    chunks, dtype = ctx.chunks, state_dtype(q.dtype)
    grad_output = torch.zeros_like(v) if grads[0] is None else grads[0]
    decays = Decays(slopes, ctx.chunk_size, dtype)
    dq = _grad_q_from_states(k, v, grad_output, initial_state, chunks, decays)
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    scan = _ReverseScan(decays, grads[1], initial_state)
    for chunk in reversed(chunks):
        q_chunk, k_chunk, v_chunk, do_chunk = (_head_major(x, chunk, dtype) for x in (q, k, v, grad_output))
        dq_chunk, dk_chunk, dv_chunk = scan.step(chunk, q_chunk, k_chunk, v_chunk, do_chunk)
        rows = slice(chunk.start, chunk.end)
        dq[rows] += dq_chunk.transpose(0, 1)  # [H, m, D] -> [m, H, D]
        dk[rows], dv[rows] = dk_chunk.transpose(0, 1), dv_chunk.transpose(0, 1)
    return dq.to(q.dtype), dk, dv, None, scan.grad_initial_state, None, None, None


def _grad_q_from_states(
    k: Tensor, v: Tensor, grad_output: Tensor, initial_state: Tensor | None, chunks: list[Chunk], decays: Decays
) -> Tensor:
    """What the states entering the chunks add to dq: [T, H, Dk] in the states' dtype.

    Only dq needs those states, so adding their part while they are recomputed in order spares keeping them.
    """
    dtype = state_dtype(k.dtype)
    dq = torch.zeros(k.shape, dtype=dtype, device=k.device)
    state: Tensor | None = None
    for chunk in chunks:
        k_chunk, v_chunk, do_chunk = (_head_major(x, chunk, dtype) for x in (k, v, grad_output))
        dq_chunk = _head_major(dq, chunk, dtype)
        for piece in chunk.pieces:
            state = _state_entering(piece, state, initial_state)
            if state is not None:
                rows = slice(piece.start, piece.end)
                dq_chunk[:, rows] = (do_chunk[:, rows] * decays.entering(piece.end - piece.start)) @ state.mT
            if not piece.is_last:
                state = _leaving_state(k_chunk, v_chunk, piece, state, decays)
    return dq


class _ReverseScan:
    """Gradients chunk by chunk, from the last to the first, carrying the gradient of the state."""

    def __init__(self, decays: Decays, grad_final_state: Tensor | None, initial_state: Tensor | None) -> None:
        self._decays = decays
        self._grad_final_state = grad_final_state
        self.grad_initial_state = None if initial_state is None else torch.empty_like(initial_state)
        self._grad_state: Tensor | None = None

    def step(self, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq without the entering states' part, dk [H, m, Dk], and dv [H, m, Dv] of one chunk."""
        decay = self._decays.within(chunk)
        grad_scores = (do @ v.mT).mul_(decay)  # [H, m, m]
        scores = (q @ k.mT).mul_(decay)  # [H, m, m]
        dq, dk, dv = grad_scores @ k, grad_scores.mT @ q, scores.mT @ do
        for piece in reversed(chunk.pieces):
            rows, length = slice(piece.start, piece.end), piece.end - piece.start
            grad_leaving = self._grad_leaving(piece)
            if grad_leaving is not None:
                leaving = self._decays.leaving(length)
                dk[:, rows].baddbmm_(v[:, rows] * leaving, grad_leaving.mT)
                dv[:, rows].baddbmm_(k[:, rows] * leaving, grad_leaving)
            self._grad_state = None
            if not piece.is_first or self.grad_initial_state is not None:
                grad_entering = q[:, rows].mT @ (do[:, rows] * self._decays.entering(length))  # [H, Dk, Dv]
                if grad_leaving is not None:
                    grad_entering.addcmul_(grad_leaving, self._decays.over(length))
                self._grad_state = grad_entering
                if self.grad_initial_state is not None and piece.is_first:
                    self.grad_initial_state[piece.document] = grad_entering
        return dq, dk, dv

    def _grad_leaving(self, piece: Piece) -> Tensor | None:
        if not piece.is_last:
            return self._grad_state
        return None if self._grad_final_state is None else self._grad_final_state[piece.document]


def chunk_lightning_attention(call: Call, chunk_size: int = CHUNK_SIZE) -> tuple[Tensor, Tensor | None]:
    """Run the chunked form by chunks of ``chunk_size`` tokens.

    Differentiable once, in q, k, v and initial_state. Only the inputs are kept for the backward pass.

    Returns:
        The output [T, H, Dv] in v's dtype; the final states [N, H, Dk, Dv] in ``state_dtype(q.dtype)``, or None.
    """
    size = min(chunk_size, call.q.shape[0])
    chunks = cut_into_chunks(call.cu_seqlens, size)
    return _ChunkLightningAttention.apply(
        call.q, call.k, call.v, call.slopes, call.initial_state, chunks, call.output_final_state, size
    )
