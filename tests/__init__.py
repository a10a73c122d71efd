"""Tests, one folder a room. A package, so that worker processes import test functions by module name."""
