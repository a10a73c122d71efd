"""MiniMax-Text-01 and M1."""
