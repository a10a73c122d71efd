"""What a user says of conversations. Without any import that takes time: it is sent to processes that start at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MESSAGES_KEY = "messages"
"""Key of a conversation's messages, unless named."""


@dataclass(frozen=True)
class ChatOptions:
    """How conversations become documents."""

    template: Path | None = None
    """File of a chat template; none takes the tokenizer folder's own."""
    max_length: int | None = None
    """Tokens of a document at most; none takes any."""
    too_long: Literal["drop", "cut"] | None = None
    """What becomes of longer ones: they are left out, or lose their end. To be said with ``max_length``."""

    def __post_init__(self) -> None:
        if (self.max_length is None) != (self.too_long is None):
            given, missing = ("max_length", "too_long") if self.too_long is None else ("too_long", "max_length")
            flag, other = (f"--{name.replace('_', '-')}" for name in (given, missing))
            what = "drop or cut" if missing == "too_long" else "a number of tokens"
            raise ValueError(f"{flag} is given without {other}: say {what}, so that nothing is lost unasked")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"--max-length is {self.max_length}: a document needs at least 2 tokens to have a label")
