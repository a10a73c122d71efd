"""Text to token ids and back."""

from megatron_m1.data.tokenizers.load import Tokenizer, check_vocab_size, load_tokenizer, train_sentencepiece

__all__ = ["Tokenizer", "check_vocab_size", "load_tokenizer", "train_sentencepiece"]
