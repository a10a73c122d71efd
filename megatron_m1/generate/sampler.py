"""Greedy, temperature and top-p sampling: prompts prefilled in chunks, then a token of every sequence a pass.

Models of ``model.whole`` run within ``runtime.alone.default_group``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_m1.generate.sampling import Sampling
from megatron_m1.layers.caches import Caches
from megatron_m1.layers.pack import PackedBatchParams
from megatron_m1.parallel.layout import SequenceLayout


@torch.no_grad()
def forward(
    model: GPTModel, caches: Caches, pieces: Sequence[tuple[int, Sequence[int]]], *, every: bool = False
) -> Tensor:
    """Run the next tokens of some sequences through the model.

    Args:
        model: whole, on one process, in evaluation mode.
        caches: of all sequences; changed.
        pieces: sequence and its next tokens, one or more; every sequence at most once.
        every: logits of all tokens; False gives those of each piece's last one.

    Returns:
        [pieces, vocabulary] or, with ``every``, [tokens, vocabulary].
    """
    bounds = [0]
    for _, ids in pieces:
        bounds.append(bounds[-1] + len(ids))
    device = model.output_layer.weight.device
    tokens = torch.tensor([[token for _, ids in pieces for token in ids]], device=device)
    params = PackedBatchParams.of(SequenceLayout.build(bounds).to(device))
    params.caches = caches
    caches.begin([sequence for sequence, _ in pieces])
    hidden = model.decoder(
        hidden_states=model.embedding(tokens, None), attention_mask=None, packed_seq_params=params
    )  # [n, 1, hidden]
    caches.end(bounds)
    if not every:
        hidden = hidden[torch.tensor(bounds[1:], device=device) - 1]
    logits, _ = model.output_layer(hidden)
    chosen: Tensor = logits[:, 0].float()
    return chosen


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose a token from logits [vocabulary] (fp32), on the CPU.

    Raises:
        ValueError: some are not finite.
    """
    if not bool(logits.isfinite().all()):
        raise ValueError("logits are not finite: the model has diverged, or its numbers are too large for this dtype")
    if sampling.temperature == 0:
        return int(logits.argmax())
    # Differences to the largest: divided by a very small temperature, logits themselves would overflow.
    probabilities = torch.softmax((logits - logits.max()).double() / sampling.temperature, dim=-1)
    ordered, ids = probabilities.sort(descending=True)
    # A token is kept while the ones before it add up to less than top_p: so the likeliest always is.
    kept = ordered * (ordered.cumsum(-1) - ordered < sampling.top_p)
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


def prefill(model: GPTModel, caches: Caches, prompts: Sequence[Sequence[int]], chunk_tokens: int) -> Tensor:
    """Run whole prompts through the model, ``chunk_tokens`` at a time.

    Returns:
        Logits after each prompt's last token, [prompts, vocabulary].
    """
    last: dict[int, Tensor] = {}
    done = [0] * len(prompts)
    while len(last) < len(prompts):
        room, pieces = chunk_tokens, []
        for sequence, prompt in enumerate(prompts):
            taken = min(room, len(prompt) - done[sequence])
            if taken:
                pieces.append((sequence, prompt[done[sequence] : done[sequence] + taken]))
                done[sequence] += taken
                room -= taken
        for (sequence, _), logits in zip(pieces, forward(model, caches, pieces), strict=True):
            if done[sequence] == len(prompts[sequence]):
                last[sequence] = logits
    return torch.stack([last[sequence] for sequence in range(len(prompts))])


def generate(model: GPTModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[dict[int, int]]:
    """Continue prompts of any lengths, together and without padding.

    Args:
        model: whole, on one process, in evaluation mode.
        prompts: token ids, one or more each.
        sampling: how.

    Yields:
        The next token of every sequence that goes on, by its index.

    Raises:
        ValueError: a prompt is empty or has an id that is no row of the embedding, ``sampling`` is out of range, or
            logits are not finite.
    """
    sampling.check()
    rows = model.embedding.word_embeddings.weight.shape[0]
    for prompt in prompts:
        if not prompt:
            raise ValueError("a prompt is empty: this model has no begin mark, give at least one token")
        if not all(0 <= token < rows for token in prompt):
            raise ValueError(f"a prompt has a token beyond the model's {rows} ids: it is another tokenizer's")
    # A stream of random numbers for each sequence: what one draws does not depend on how long the others run.
    streams = [torch.Generator().manual_seed(sampling.seed + index) for index in range(len(prompts))]
    caches = Caches(len(prompts))
    active = list(range(len(prompts)))
    logits = prefill(model, caches, prompts, sampling.chunk_tokens)
    for count in range(sampling.max_tokens):
        drawn = zip(active, logits.cpu(), strict=True)
        tokens = {sequence: choose(row, sampling, streams[sequence]) for sequence, row in drawn}
        tokens = {sequence: token for sequence, token in tokens.items() if token != sampling.stop}
        if tokens:
            yield tokens
        active = list(tokens)
        if not active or count + 1 == sampling.max_tokens:
            return
        logits = forward(model, caches, [(sequence, [tokens[sequence]]) for sequence in active])
