"""What the kinds of layers are, without torch: parameters, FLOPs, state, checks. ``layers`` has a module for each."""
