"""Flags of Megatron-LM and torchtitan, and what they are called here."""
