"""Checkpoints: their folders, what they hold, how they are written and read."""
