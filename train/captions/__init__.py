"""Captions as numbers: words, vocabularies, and the set that batches are drawn from."""
