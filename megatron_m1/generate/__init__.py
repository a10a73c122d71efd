"""A plain, exact sampler on our own model, to look at what was trained."""
