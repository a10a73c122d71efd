"""Reads what runs have recorded and draws it as one page. Knows runs by their files alone, and imports no torch."""
