"""From documents to a tokenised corpus."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_m1.data.tokenize.corpus import tokenize_corpus

__all__ = ["tokenize_corpus"]


def __getattr__(name: str) -> Any:
    """Import the command when it is asked for: its workers take other modules of this room, and none of its readers."""
    if name == "tokenize_corpus":
        from megatron_m1.data.tokenize.corpus import tokenize_corpus

        return tokenize_corpus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
