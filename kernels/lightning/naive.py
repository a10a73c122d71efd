"""Lightning attention token by token: the truth that every other form is compared with.

    S_t = exp(-s) S_{t-1} + k_t^T v_t        o_t = q_t S_t

One document after the other, one token after the other, differentiated by autograd alone.
"""

import itertools

import torch
from torch import Tensor

from megatron_m1.kernels.lightning.call import Call


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, decays and sums for inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def naive_lightning_attention(call: Call) -> tuple[Tensor, Tensor | None]:
    """Run the recurrence over every token.

    Returns:
        The output [T, H, Dv] in v's dtype; the final states [N, H, Dk, Dv] in ``state_dtype(q.dtype)``, or None.
    """
    q, k, v, initial_state = call.q, call.k, call.v, call.initial_state
    dtype = state_dtype(q.dtype)
    decay = torch.exp(-call.slopes.to(dtype))[:, None, None]  # [H, 1, 1]
    outputs, final_states = [], []
    for document, (start, end) in enumerate(itertools.pairwise(call.cu_seqlens)):
        if initial_state is None:
            state = torch.zeros(q.shape[1], q.shape[2], v.shape[2], dtype=dtype, device=q.device)
        else:
            state = initial_state[document]
        for token in range(start, end):
            update = k[token].to(dtype).unsqueeze(-1) * v[token].to(dtype).unsqueeze(-2)  # [H, Dk, Dv]
            state = decay * state + update
            outputs.append((q[token].to(dtype).unsqueeze(-2) @ state).squeeze(-2))  # [H, Dv]
        final_states.append(state)
    return torch.stack(outputs).to(v.dtype), torch.stack(final_states) if call.output_final_state else None
