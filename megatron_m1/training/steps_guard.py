"""Non-finite steps: each is skipped and counted, too many in a row end the run."""

from __future__ import annotations

import math

from megatron_m1.printing import counted


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient norm that is not finite."""


class StepsGuard:
    """Counts skipped steps. Pure logic: fed the same numbers, it decides the same on every rank.

    Attributes:
        total: steps skipped in the whole run.
        in_row: steps skipped since the last good one.
    """

    def __init__(self, max_in_row: int) -> None:
        """``max_in_row``: steps in a row, 1 or more, with which the run ends. Raises ValueError below 1."""
        if max_in_row < 1:
            raise ValueError(f"train.max_skipped_steps is {max_in_row}; it must be 1 or more")
        self.max_in_row = max_in_row
        self.total = 0
        self.in_row = 0

    def record(self, step: int, loss: float, grad_norm: float) -> None:
        """Count ``step`` as skipped if its figures are not finite, which is when ``train_step`` has not applied it.

        Args:
            step: number of the step, for the message.
            loss: mean over the global batch, the same on every rank.
            grad_norm: global norm before clipping, the same on every rank.

        Raises:
            NonFiniteError: this is the ``max_in_row``-th step in a row that is not finite.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_row = 0
            return
        self.total += 1
        self.in_row += 1
        if self.in_row >= self.max_in_row:
            where = f"step {step}" if self.in_row == 1 else f"steps {step - self.in_row + 1} to {step}"
            raise NonFiniteError(
                f"{where}: loss or gradient norm not finite {counted(self.in_row, 'time')} in a row "
                f"(last: loss {loss}, gradient norm {grad_norm}); lower optimizer.lr, lengthen the warm-up, or restart "
                f"from an earlier checkpoint"
            )

    def state_dict(self) -> dict[str, int]:
        """Return both counts, for the checkpoint."""
        return {"total": self.total, "in_row": self.in_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from the counts of a checkpoint."""
        self.total = state["total"]
        self.in_row = state["in_row"]
