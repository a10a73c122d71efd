"""What a model costs, counted without torch."""
