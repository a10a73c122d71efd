"""Lightning attention token by token, as matrix units multiply: operands rounded to the inputs' dtype, float32 sums."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def rounded_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    lengths: list[int],
    initial_state: Tensor | None,
    grad_o: Tensor,
    grad_final_state: Tensor | None,
) -> dict[str, Tensor]:
    """Return o, final_state and the gradients of q, k, v and initial_state for documents of the given lengths.

    What a product reads is q, k, v, grad_o, which have the inputs' dtype, or a state, which is rounded to it. Results
    of that dtype are rounded once more; states stay float32.
    """
    dtype = q.dtype
    bounds = [0, *itertools.accumulate(lengths)]
    q, k, v, grad_o = (x.float() for x in (q, k, v, grad_o))
    decay = torch.exp(-slopes.float())[:, None, None]  # [H, 1, 1]
    zero = torch.zeros(q.shape[1], q.shape[2], v.shape[2], device=q.device)
    o, dq, dk, dv = (torch.empty_like(x) for x in (v, q, k, v))
    final, d_initial = [], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        state = zero if initial_state is None else initial_state[n]
        for t in range(start, end):
            state = decay * state + k[t, :, :, None] * v[t, :, None, :]
            rounded = state.to(dtype).float()
            o[t] = (q[t, :, None, :] @ rounded).squeeze(1)
            dq[t] = (rounded @ grad_o[t, :, :, None]).squeeze(2)
        final.append(state)
        state = zero if grad_final_state is None else grad_final_state[n]
        for t in reversed(range(start, end)):
            state = state + q[t, :, :, None] * grad_o[t, :, None, :]
            rounded = state.to(dtype).float()
            dk[t] = (rounded @ v[t, :, :, None]).squeeze(2)
            dv[t] = (k[t, :, None, :] @ rounded).squeeze(1)
            state = decay * state
        d_initial.append(state)
    rows = {name: x.to(dtype) for name, x in (("o", o), ("dq", dq), ("dk", dk), ("dv", dv))}
    return rows | {"final_state": torch.stack(final), "d_initial_state": torch.stack(d_initial)}
