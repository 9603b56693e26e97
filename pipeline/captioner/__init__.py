"""A trained model at work on photos: from files, from memory, and from a cache."""

from pipeline.captioner.captioner import Captioner
from pipeline.captioner.forks import ForkError
from pipeline.captioner.predictions import Caption, CaptionError, Prediction

__all__ = ["Caption", "CaptionError", "Captioner", "ForkError", "Prediction"]
