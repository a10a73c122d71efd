"""Megatron-LM's length and learning-rate schedule, which count iterations or samples, as steps and tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal

from megatron_m1.config.foreign.command_line import CommandLine, Given
from megatron_m1.printing import counted

FLAGS = (
    *("train-iters", "train-samples", "eval-iters"),
    *("lr-decay-style", "lr-decay-iters", "lr-decay-samples"),
    *("lr-warmup-iters", "lr-warmup-samples", "lr-warmup-fraction"),
    *("lr-wsd-decay-iters", "lr-wsd-decay-samples", "lr-wsd-decay-style"),
)
"""What is read here, besides the sizes of a batch and of a pack."""
_STYLES = ("linear", "cosine")
"""Curves that both programs have."""


@dataclass
class Said:
    """Settings by dotted path, each with a comment, and what can't be said."""

    settings: dict[str, tuple[object, str]] = field(default_factory=dict)
    unsaid: list[str] = field(default_factory=list)

    def say(self, path: str, value: object, comment: str = "") -> None:
        """Set a field."""
        self.settings[path] = (value, comment)


class Schedule:
    """Translates ``FLAGS`` of one command line.

    Args:
        command: what was given.
        said: where settings and reasons go.
    """

    def __init__(self, command: CommandLine, said: Said) -> None:
        self._command = command
        self._said = said
        self._batch = self._whole("global-batch-size")
        self._pack = self._whole("seq-length") or self._whole("encoder-seq-length")

    def translate(self) -> None:
        """Say the length of the run, the schedule and the size of a validation.

        Raises:
            ValueError: a value is no number, or the spans don't fit each other; one line.
        """
        self._length()
        self._validation()
        given = [found for name in FLAGS if name.startswith("lr-") and (found := self._command.known(name))]
        if self._batch is None or self._pack is None:
            why = "tokens of an iteration are --global-batch-size x --seq-length, which are not both given as numbers"
            self._said.unsaid += [f"{found.text}: {why}" for found in given]
            return
        decay_end = self._tokens("lr-decay") or self._tokens("train")
        if decay_end is None:
            self._said.unsaid += [
                f"{found.text}: neither --train-iters nor --lr-decay-iters says of what" for found in given
            ]
            return
        self._spans(decay_end)

    def _length(self) -> None:
        iterations, samples = self._command.known("train-iters"), self._command.known("train-samples")
        if iterations is not None:
            self._said.say("train.max_steps", iterations.whole_number(1))
        elif samples is not None and self._batch is not None:
            steps = -(-samples.whole_number(1) // self._batch)
            self._said.say("train.max_steps", steps, f"{samples.text} in batches of {self._batch:,}")
        elif samples is not None:
            self._said.unsaid.append(
                f"{samples.text}: in steps it is samples / --global-batch-size, which is not given"
            )

    def _validation(self) -> None:
        given = self._command.known("eval-iters")
        if given is None:
            return
        iterations = given.whole_number()
        if self._batch is None:
            self._said.unsaid.append(
                f"{given.text}: train.eval_samples is that x --global-batch-size, which is not given"
            )
        elif iterations:
            self._said.say(
                "train.eval_samples", iterations * self._batch, f"{given.text} of {counted(self._batch, 'pack')}"
            )

    def _spans(self, decay_end: Decimal) -> None:
        warmup, comment = self._warmup(decay_end)
        if warmup >= decay_end:
            raise ValueError(
                f"the warm-up of {int(warmup):,} tokens does not end before the decay, after {int(decay_end):,}: lower "
                "it"
            )
        steps = self._command.known("lr-warmup-iters")
        if steps is not None and steps.text == comment and warmup:
            self._said.say("optimizer.lr_warmup_steps", steps.whole_number())
        elif warmup:
            self._said.say("optimizer.lr_warmup_tokens", int(warmup), comment)
        given = self._command.known("lr-decay-style")
        style = given.values[0] if given is not None and given.values else "linear"
        how = "" if given else "Megatron-LM's default"
        if style == "constant":
            return
        if style == "WSD":
            self._stable_then_decay(warmup, decay_end)
        elif style in _STYLES:
            self._said.say("optimizer.lr_decay_tokens", int(decay_end - warmup), self._decay_comment(warmup))
            self._said.say("optimizer.lr_decay_style", style, how)
        elif style == "inverse-square-root":
            self._said.unsaid.append(f"--lr-decay-style {style}: there are linear, cosine and exponential decay")
        else:
            raise ValueError(
                f"--lr-decay-style {style}: Megatron-LM has constant, linear, cosine, inverse-square-root, WSD"
            )

    def _warmup(self, decay_end: Decimal) -> tuple[Decimal, str]:
        fraction = self._command.known("lr-warmup-fraction")
        if fraction is not None:
            if not 0 <= fraction.number() < 1:
                raise ValueError(f"{fraction.text}: give a fraction below 1")
            return fraction.number() * decay_end, f"{fraction.text} of {int(decay_end):,} tokens"
        given = self._command.known("lr-warmup-iters") or self._command.known("lr-warmup-samples")
        return self._tokens("lr-warmup") or Decimal(0), given.text if given else ""

    def _decay_comment(self, warmup: Decimal) -> str:
        given = self._command.known("lr-decay-iters") or self._command.known("lr-decay-samples")
        until = given.text if given else "to the end of the run"
        return f"{until}, less the warm-up" if warmup else until

    def _stable_then_decay(self, warmup: Decimal, decay_end: Decimal) -> None:
        decay = self._tokens("lr-wsd-decay")
        if decay is None:
            raise ValueError("--lr-decay-style WSD needs --lr-wsd-decay-iters or --lr-wsd-decay-samples")
        if decay > decay_end - warmup:
            raise ValueError("the decay of --lr-decay-style WSD is longer than what the warm-up leaves: lower it")
        self._said.say("optimizer.lr_constant_tokens", int(decay_end - warmup - decay), "WSD")
        self._said.say("optimizer.lr_decay_tokens", int(decay), "WSD")
        given = self._command.known("lr-wsd-decay-style")
        style = given.values[0] if given is not None and given.values else "exponential"
        if style in _STYLES:
            self._said.say("optimizer.lr_decay_style", style)
        else:
            self._said.say("optimizer.lr_decay_style", "linear", f"instead of WSD's {style}, another curve than ours")
            self._said.unsaid.append(f"--lr-wsd-decay-style {style}: its curve is not here; linear is said instead")

    def _tokens(self, name: str) -> Decimal | None:
        """Tokens of a span that is given in iterations or in samples; None if it is not given."""
        iterations, samples = self._command.known(f"{name}-iters"), self._command.known(f"{name}-samples")
        assert self._batch is not None and self._pack is not None
        if iterations is not None:
            return Decimal(iterations.whole_number() * self._batch * self._pack)
        return None if samples is None else Decimal(samples.whole_number() * self._pack)

    def _whole(self, name: str) -> int | None:
        given: Given | None = self._command.known(name)
        return None if given is None else given.whole_number(1)
