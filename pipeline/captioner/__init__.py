"""A trained model at work on photos: from files, from memory, and from a cache."""

from train.torch_import import share_machine

share_machine()  # before PyTorch is imported by the modules below

from pipeline.captioner.captioner import Captioner  # noqa: E402
from pipeline.captioner.forks import ForkError  # noqa: E402
from pipeline.captioner.predictions import Caption, CaptionError, Prediction  # noqa: E402

__all__ = ["Caption", "CaptionError", "Captioner", "ForkError", "Prediction"]
