"""The embedded corpus: text that every machine has, for a first run without a download."""
