"""Lightning attention as a dense masked product, document by document: quadratic, torch only."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, lengths: list[int], initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return o [T, H, Dv] and the final states [N, H, Dk, Dv] of documents of the given lengths, end to end."""
    outputs, states = [], []
    pieces = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    for document, (query, key, value) in enumerate(pieces):
        length = query.shape[0]
        age = torch.arange(length)[:, None] - torch.arange(length)[None, :]  # [n, n]
        log_weight = -slopes.to(q.dtype)[:, None, None] * age
        weight = log_weight.masked_fill(age < 0, float("-inf")).exp()  # [H, n, n]
        output = torch.einsum("thd,shd,hts,she->the", query, key, weight, value)
        state = torch.einsum("hs,shd,she->hde", weight[:, -1], key, value)
        if initial_state is not None:
            since_start = torch.exp(-slopes.to(q.dtype)[:, None] * torch.arange(1, length + 1))  # [H, n]
            output = output + torch.einsum("thd,ht,hde->the", query, since_start, initial_state[document])
            state = state + since_start[:, -1, None, None] * initial_state[document]
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs), torch.stack(states)
