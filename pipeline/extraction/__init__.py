"""Extraction: photos through the encoder into a feature cache, and checks of such a cache."""
