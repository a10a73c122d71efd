"""Between our checkpoints and Hugging Face folders of the MiniMax-M1 family: one weight map, streamed both ways."""
