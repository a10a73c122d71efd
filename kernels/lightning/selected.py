"""Lightning attention whose states belong to selected documents, and the state of tokens alone.

A state of MiniMax-M1's size takes 4 MiB a document, and a pack can hold hundreds of documents of which one or two carry
a state over a boundary. These are the pieces of sequence parallelism: ``lightning_state`` first, then communication
beside whatever else there is to do, then ``lightning_attention_selected`` from the states that came in.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_m1.kernels.choice import choose_backend
from megatron_m1.kernels.lightning.checks import check_cu_seqlens, check_heads, check_state, whole_numbers
from megatron_m1.kernels.lightning.chunk import chunk_lightning_attention
from megatron_m1.kernels.lightning.naive import naive_lightning_attention, state_dtype


def _check_index(index: Sequence[int] | Tensor, name: str, documents: int) -> list[int]:
    """``index`` as ints, one per document, each slot at most once."""
    if isinstance(index, Tensor) and index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {index.dtype}: give int32 slots, -1 for none")
    if isinstance(index, Tensor) and index.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(index.shape)}: give one slot per document, [{documents}]")
    wanted = f"one slot for each of {documents} documents, -1 for none"
    slots = index.tolist() if isinstance(index, Tensor) else whole_numbers(index, name, wanted)
    if len(slots) != documents or any(slot < -1 for slot in slots):
        raise ValueError(f"{name} is {slots}: give {wanted}")
    used = [slot for slot in slots if slot >= 0]
    if len(set(used)) < len(used):
        raise ValueError(f"{name} is {slots}: two documents can't share a slot")
    return slots


def _check_final_index(index: Sequence[int] | Tensor | None, documents: int) -> tuple[list[int], int]:
    slots = [-1] * documents if index is None else _check_index(index, "final_index", documents)
    kept = sum(slot >= 0 for slot in slots)
    if max(slots) != kept - 1:
        raise ValueError(f"final_index is {slots}: number the {kept} states that are kept from 0 to {kept - 1}")
    return slots, kept


def _check_initial(
    states: Tensor | None, index: Sequence[int] | Tensor | None, q: Tensor, v: Tensor, documents: int
) -> list[int] | None:
    """The slots with which documents begin, None if no states are given."""
    if (states is None) != (index is None):
        raise ValueError("initial_state and initial_index go together: give both or none")
    if states is None or index is None:
        return None
    check_state(states, "initial_state", q, v, states.shape[0] if states.dim() else 0, of="M")
    slots = _check_index(index, "initial_index", documents)
    if max(slots) >= states.shape[0]:
        raise ValueError(f"initial_index is {slots}: initial_state has {states.shape[0]} slots")
    return slots


def _spread(states: Tensor, slots: list[int]) -> Tensor:
    """A state per document, zero where ``slots`` has -1."""
    documents = [n for n, slot in enumerate(slots) if slot >= 0]
    rows = torch.tensor([slots[n] for n in documents], dtype=torch.int64, device=states.device)
    place = torch.tensor(documents, dtype=torch.int64, device=states.device)
    zeros = states.new_zeros(len(slots), *states.shape[1:])
    return zeros.index_copy(0, place, states.index_select(0, rows))


def lightning_attention_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    initial_state: Tensor | None = None,
    initial_index: Tensor | Sequence[int] | None = None,
    final_index: Tensor | Sequence[int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``lightning_attention`` with states for selected documents only.

    Args:
        q: queries [T, H, Dk], as in ``lightning_attention``; so are k, v, slopes, cu_seqlens and backend.
        k: keys [T, H, Dk].
        v: values [T, H, Dv].
        slopes: [H] float32.
        cu_seqlens: [N + 1] document bounds.
        initial_state: [M, H, Dk, Dv] float32 (float64 for float64 inputs), M any number of slots.
        initial_index: [N] ints (int32 tensor, best on the CPU: its values are read, or ints): the slot of
            ``initial_state`` that the document begins with, -1 for zero. No slot twice. Goes with ``initial_state``.
        final_index: [N] ints: the slot of the returned states that the document's last state goes to, -1 if it is not
            kept. The slots are 0 .. K - 1, each once. Default: none is kept.
        backend: as in ``lightning_attention``; "naive" makes a state for each of the N documents on the way.

    Returns:
        o [T, H, Dv] in v's dtype, and the kept states [K, H, Dk, Dv], or None if there is none. Differentiable once in
        q, k, v and initial_state; a slot that no document begins with has gradient zero.

    Raises:
        ValueError: as ``lightning_attention``; an index of another length, with a slot twice, out of range or left out.

    Example:
        >>> q, k, v = (torch.randn(10, 2, 16) for _ in range(3))
        >>> o, state = lightning_attention_selected(q, k, v, torch.ones(2), cu_seqlens=[0, 3, 10], final_index=[-1, 0])
        >>> o.shape, state.shape
        (torch.Size([10, 2, 16]), torch.Size([1, 2, 16, 16]))
    """
    check_heads(q, k, v, slopes)
    bounds = check_cu_seqlens(cu_seqlens, q.shape[0])
    entering = _check_initial(initial_state, initial_index, q, v, len(bounds) - 1)
    leaving, kept = _check_final_index(final_index, len(bounds) - 1)
    name = choose_backend(q.device, backend)
    if name == "triton":
        from megatron_m1.kernels.lightning.triton_attention import triton_lightning_attention

        return triton_lightning_attention(
            q, k, v, slopes, bounds, initial_state, kept > 0, initial_index=entering, final_index=leaving
        )
    if name == "chunk":
        with torch.autocast(q.device.type, enabled=False):
            return chunk_lightning_attention(
                q, k, v, slopes, bounds, initial_state, kept > 0, initial_index=entering, final_index=leaving
            )
    if initial_state is not None and entering is not None:
        initial_state = _spread(initial_state, entering)
    with torch.autocast(q.device.type, enabled=False):
        o, states = naive_lightning_attention(q, k, v, slopes, bounds, initial_state, kept > 0)
    if states is None:
        return o, None
    order = [leaving.index(slot) for slot in range(kept)]
    return o, states.index_select(0, torch.tensor(order, device=states.device))


def lightning_state(
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    final_index: Tensor | Sequence[int],
    backend: str | None = None,
) -> Tensor:
    """The states that these tokens alone leave in selected documents: sum over t of exp(-s (n - 1 - t)) k_t^T v_t.

    A document of n tokens that was entered with a state S leaves exp(-s n) S plus this.

    Args:
        k: keys [T, H, Dk], as in ``lightning_attention``; so are v, slopes, cu_seqlens and backend.
        v: values [T, H, Dv].
        slopes: [H] float32.
        cu_seqlens: [N + 1] document bounds.
        final_index: [N] ints, the slots of the result, -1 where none is wanted, as in ``lightning_attention_selected``.
            Documents without a slot are not read.
        backend: as in ``lightning_attention``.

    Returns:
        [K, H, Dk, Dv] float32 (float64 for float64 inputs), K >= 1. Differentiable once in k and v.

    Raises:
        ValueError: as ``lightning_attention_selected``; no document has a slot.

    Example:
        >>> k, v = torch.randn(10, 2, 16), torch.randn(10, 2, 16)
        >>> lightning_state(k, v, torch.ones(2), cu_seqlens=[0, 3, 10], final_index=[-1, 0]).shape
        torch.Size([1, 2, 16, 16])
    """
    check_heads(None, k, v, slopes)
    bounds = check_cu_seqlens(cu_seqlens, k.shape[0])
    leaving, kept = _check_final_index(final_index, len(bounds) - 1)
    if kept == 0:
        raise ValueError(f"final_index is {leaving}: give at least one document a slot")
    name = choose_backend(k.device, backend)
    if name == "triton":
        from megatron_m1.kernels.lightning.triton_attention import triton_lightning_state

        return triton_lightning_state(k, v, slopes, bounds, leaving)
    return _plain_state(k, v, slopes, bounds, leaving)


def _plain_state(k: Tensor, v: Tensor, slopes: Tensor, bounds: list[int], leaving: list[int]) -> Tensor:
    """One matrix product per document and head."""
    dtype = state_dtype(k.dtype)
    states = []
    for n in (leaving.index(slot) for slot in range(max(leaving) + 1)):
        rows = slice(bounds[n], bounds[n + 1])
        left = torch.arange(bounds[n + 1] - bounds[n] - 1, -1, -1, device=k.device, dtype=dtype)
        weight = torch.exp(-left[:, None] * slopes.to(dtype))  # [n, H]
        weighted = k[rows].to(dtype) * weight[..., None]
        with torch.autocast(k.device.type, enabled=False):
            states.append(torch.einsum("tha,thc->hac", weighted, v[rows].to(dtype)))
    return torch.stack(states)
