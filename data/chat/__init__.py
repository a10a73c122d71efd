"""Conversations as training data: rows of messages, through a tokenizer's chat template, to ids and what is learnt."""
