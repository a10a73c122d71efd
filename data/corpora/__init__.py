"""Tokenised corpora on disk: what their files say, and whether their ids fit."""
