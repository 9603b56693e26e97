"""Captions of a model, a file or people, scored against references."""
