"""From documents to a tokenised corpus."""

from megatron_m1.data.tokenize.corpus import tokenize_corpus

__all__ = ["tokenize_corpus"]
