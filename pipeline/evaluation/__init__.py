"""Scoring captions of a model, of a file or of people against references."""
