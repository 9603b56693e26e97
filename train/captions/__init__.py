"""Captions as numbers: tokens, vocabularies, photo views, and the set that batches come from."""
