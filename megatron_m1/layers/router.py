"""The top-k router, its weight kept in fp32, with counts of how the experts are loaded."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_tokens_per_expert_and_token_count,
    router_gating_linear,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch import distributed as dist

from megatron_m1.layers.engine import EngineConfig
from megatron_m1.parallel.expert.quota import within_capacity


class Router(TopKRouter):
    """``TopKRouter`` whose weight stays fp32 and which adds up its aux loss and the tokens of each expert."""

    config: EngineConfig

    def __init__(self, config: EngineConfig, *args: Any, **kwargs: Any) -> None:
        # The library makes a bias, and what it counts, on the current GPU even of a model that is elsewhere.
        plain = copy(config)
        plain.moe_router_enable_expert_bias, plain.moe_router_load_balancing_type = False, "none"
        super().__init__(plain, *args, **kwargs)
        self.config, self.routing_type = config, config.moe_router_load_balancing_type
        if config.moe_router_enable_expert_bias:
            self._add_bias()
        self.tokens_per_expert: Tensor | None = None
        self.aux_loss_sum: Tensor | None = None
        self.tokens_kept: Tensor | None = None
        self._seen: Tensor | None = None

    def _add_bias(self) -> None:
        self.enable_expert_bias = True
        device = self.weight.device if self.config.use_cpu_initialization else torch.cuda.current_device()
        for name, is_kept in (("local_tokens_per_expert", False), ("expert_bias", True)):
            delattr(self, name)  # None
            self.register_buffer(name, torch.zeros(self.num_experts, device=device), persistent=is_kept)

    def reset_parameters(self) -> None:
        """Keep the weight in fp32 (the released checkpoint stores it so), marked for sequence parallelism."""
        self.weight.data = self.weight.data.to(dtype=torch.float32)
        self.weight.sequence_parallel = self.config.sequence_parallel

    def gating(self, input: Tensor) -> Tensor:
        """Logits [..., experts] in fp32, where the weight is: the library would move a CPU's to the current GPU."""
        logits: Tensor = router_gating_linear(input, self.weight, self.bias, torch.float32)
        return logits

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts, and drop what their capacity over all ranks of the stage does not take.

        Counts the choices of passes that will be differentiated, before any is dropped.

        Args:
            logits: [n, 1, experts].
            padding_mask: bool [n, 1], true for padding, or None.

        Returns:
            Probabilities [n, experts], 0 where not chosen or dropped, and what is chosen and kept, bool [n, experts].
        """
        probs, routing_map = super().routing(logits, padding_mask)
        # True marks padding, whatever the library's text says.
        counted = None if padding_mask is None else ~padding_mask.reshape(-1)
        if torch.is_grad_enabled():
            chosen = routing_map.detach() if counted is None else routing_map.detach() & counted[:, None]
            counts = chosen.sum(dim=0)  # [experts]
            self.tokens_per_expert = counts if self.tokens_per_expert is None else self.tokens_per_expert + counts
        factor = self.config.model.moe_expert_capacity_factor
        if factor is not None:
            kept = self._within_capacity(probs.detach(), routing_map, factor, counted)
            probs, routing_map = probs * kept, kept
        if torch.is_grad_enabled():
            total = routing_map.sum() if factor is not None else chosen.sum()
            self.tokens_kept = total if self.tokens_kept is None else self.tokens_kept + total
        return probs, routing_map

    def _within_capacity(self, probs: Tensor, chosen: Tensor, factor: float, counted: Tensor | None) -> Tensor:
        return within_capacity(probs, chosen, topk=self.topk, factor=factor, counted=counted, group=self.tp_dp_cp_group)

    def _apply_global_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """A pack's probabilities against the loads of the step's packs so far, on all ranks of the stage.

        The library's own keeps the loads of one data-parallel rank less than ``aux_loss`` does, by that size.
        """
        coefficient = self.get_aux_loss_coeff("global_aux_loss")
        if coefficient == 0:
            return probs
        _, _, tokens = get_tokens_per_expert_and_token_count(
            routing_map, self.tp_cp_group, topk=self.topk, with_padding_mask=with_padding_mask
        )
        seen = routing_map.sum(dim=0).double()
        dist.all_reduce(seen, group=self.tp_dp_cp_group)
        self._seen = seen if self._seen is None else self._seen + seen
        # As many choices as the pack's, dealt to the experts as those of all packs.
        loads = (self._seen / self._seen.sum() * tokens * self.topk).float()
        aux_loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=loads,
            total_num_tokens=tokens,
            topk=self.topk,
            num_experts=self.num_experts,
            moe_aux_loss_coeff=coefficient,
        )
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, aux_loss, "global_load_balancing_loss", self.tp_cp_group
        )

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach the mean square of the log-sum-exp of a pack's tokens to ``logits`` [n, experts].

        The library's own weighs a rank's tokens by how many of them are no padding, so that a pack's weight would
        depend on what pads it.

        Args:
            logits: fp32.
            padding_mask: bool [n], true for padding, or None.
        """
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not self.training or not torch.is_grad_enabled():
            return logits
        squares = logits.logsumexp(dim=-1).square()  # [n]
        ranks = self.tp_cp_group.size()
        if padding_mask is None:
            counted = squares.new_tensor(float(len(squares) * ranks))
        else:
            squares = squares * ~padding_mask
            counted = (~padding_mask).sum().float()
            dist.all_reduce(counted, group=self.tp_cp_group)
        # The step divides by all tokens of the pack, with padding; attach what makes that the mean of those that count.
        z_loss = squares.sum() / counted * (len(squares) * ranks)
        scaled: Tensor = MoEAuxLossAutoScaler.apply(logits, coefficient * z_loss)
        return scaled

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the choices that the bias is updated by, without those of padding.

        The library's own can't take a mask: it compares tokens with experts.
        """
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask[:, None]
        super()._apply_expert_bias(routing_map)

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: torch.distributed.ProcessGroup,
        needs_dp_avg: bool = True,
        valid_token_count: int | Tensor | None = None,
    ) -> Tensor:
        """Attach the aux loss to ``activation`` and add it up; see ``TopKRouter``.

        Its weight, which the library multiplies by the ranks' tokens, counts padding on every rank: else a rank with
        padding would weigh less than the others, and the step's correction of the weight is one number for all.
        """
        if torch.is_grad_enabled():
            value = aux_loss.detach() / aux_loss_coeff
            self.aux_loss_sum = value if self.aux_loss_sum is None else self.aux_loss_sum + value
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, aux_loss_name, reduce_group, needs_dp_avg
        )

    def take_counts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return and forget what this rank has counted since the last call, None for what it has not.

        Tokens that chose each expert, [num_experts]; how many choices were kept (scalar); the summed, unweighted aux
        loss (scalar).
        """
        taken = self.tokens_per_expert, self.tokens_kept, self.aux_loss_sum
        self.tokens_per_expert, self.aux_loss_sum, self.tokens_kept, self._seen = None, None, None, None
        return taken
