"""What a flag of another program means here: a row of the tables beside this file."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Unit(Enum):
    """How the value of a flag becomes that of the field. Each is what is said of it."""

    SAME = ""
    NEGATED = "the other way round"
    MINUTES = "in seconds"
    ITERATIONS = "in tokens: iterations x train.global_batch_size x data.seq_length"
    SAMPLES = "in tokens: samples x data.seq_length"
    STEPS = "in steps: samples / train.global_batch_size"
    PACKS = "in packs: iterations x train.global_batch_size"
    FRACTION = "in tokens: the fraction of those of the schedule"
    LR_FACTOR = "a learning rate: optimizer.lr x the factor"
    CHUNKS = "in model chunks of a stage: model.num_layers / stages / layers of a chunk"
    PADDED = "padded to a multiple of what tensor_model_parallel_size divides"
    TOKENS = "in packs: tokens / data.seq_length"


@dataclass(frozen=True)
class Meaning:
    """One flag. Make it with one of the functions below."""

    flag: str
    """Without its dashes, with dashes inside: ``micro-batch-size``."""
    field: str | None = None
    """Dotted path of the field, or an option of ``pretrain`` that begins with ``--``; None: nothing says that."""
    unit: Unit = Unit.SAME
    value: str | None = None
    """Of a flag that stands alone: what the field gets."""
    as_here: tuple[str, ...] = ()
    """Values with which it says what is so here in any case; ``""`` is that of a flag that stands alone."""
    why: str = ""
    """What else to know: why there is no field, or what is so here."""


def same(flag: str, field: str, why: str = "") -> Meaning:
    """A field that takes the same values."""
    return Meaning(flag, field, why=why)


def converted(flag: str, field: str, unit: Unit, why: str = "") -> Meaning:
    """A field that counts in another unit."""
    return Meaning(flag, field, unit, why=why)


def turned(flag: str, field: str, value: str, why: str = "") -> Meaning:
    """A flag without a value, which gives the field one."""
    return Meaning(flag, field, value=value, why=why)


def always(flag: str, why: str, *values: str) -> Meaning:
    """What is so here in any case, for a flag that stands alone or has one of ``values``."""
    return Meaning(flag, as_here=values or ("",), why=why)


def nothing(flag: str, why: str) -> Meaning:
    """What can't be said here."""
    return Meaning(flag, why=why)


def normal_name(name: str) -> str:
    """Return a flag as the tables spell it: no dashes in front, and dashes for underscores."""
    return name.removeprefix("--").replace("_", "-").lower()
