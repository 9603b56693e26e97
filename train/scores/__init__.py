"""Scores of captions: metrics, confidence intervals, diversity, and CIDEr-D as a reward."""
