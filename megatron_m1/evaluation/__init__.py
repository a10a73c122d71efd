"""How good a model is: n-gram baselines, perplexity by position and source, needles, the standard tasks."""
