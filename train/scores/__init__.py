"""How good captions are: metrics, confidence intervals, diversity, and CIDEr-D as a reward."""
