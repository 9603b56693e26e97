"""What a run says when it diverges or runs out of memory: with advice that can be followed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from train.config import FixedRecipe
from train.device import is_out_of_memory
from train.fit.record.run_folder import TrainError


@contextlib.contextmanager
def out_of_memory_as(message: Callable[[], str]) -> Iterator[None]:
    """A context that raises TrainError with this message if it runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainError(message()) from None


def too_large_decoder(device: torch.device, recipe: FixedRecipe, words: int) -> str:
    return (
        f"{device}: out of memory for a decoder of hidden size {recipe.hidden_size}, "
        f"embedding size {recipe.embedding_size} and {words:,} words; "
        "lower --hidden-size or --embedding-size, or raise --min-count"
    )


def too_large_step(device: torch.device, recipe: FixedRecipe, *, saved: bool) -> str:
    """saved: the run has a checkpoint, which only goes on with the same batch size."""
    size = recipe.batch_size
    smaller = f"--batch-size {size // 2}" if size > 1 else "a lower --hidden-size"
    remedy = f"try {smaller}"
    if saved:
        remedy = f"{_later(device)}, or begin anew with --overwrite and {smaller}"
    return f"{device}: out of memory with batches of {size} captions; {remedy}"


def too_large_rewarded_step(device: torch.device, recipe: FixedRecipe, *, begun: bool) -> str:
    """Of a self-critical step. begun: the checkpoint is from within the self-critical epochs, and
    goes on only with the same settings.
    """
    photos, samples = recipe.self_critical_photos, recipe.self_critical_samples
    if begun:
        remedy = _later(device)
    elif photos > 1:
        remedy = f"go on with --resume and --self-critical-photos {photos // 2}"
    elif samples > 2:
        remedy = f"go on with --resume and --self-critical-samples {max(2, samples // 2)}"
    else:
        remedy = _later(device)
    return f"{device}: out of memory with {photos} photos per self-critical step; {remedy}"


def too_large_validation(device: torch.device, select_by: str) -> str:
    """select_by: of the run."""
    by_beam = select_by == "beam"
    remedy = "go on with --resume --select-by cider" if by_beam else _later(device)
    return f"{device}: out of memory while validating; {remedy}"


def diverged(
    what: str, recipe: FixedRecipe, at: tuple[int, int], saved: tuple[int, int] | None
) -> TrainError:
    """The error of a run that cannot go on, with its cause and what is kept.

    at, saved: epoch, from 0, and step, now and of the checkpoint; None if there is none.
    """
    rewarded = at[0] >= recipe.epochs
    option = "--self-critical-rate" if rewarded else "--learning-rate"
    if saved is None:
        remedy = f"lower {option} and run the command again (nothing was saved)"
    elif rewarded and saved <= (recipe.epochs, 0):
        remedy = f"go on with --resume and a lower {option}"
    else:
        remedy = (
            f"begin with a lower {option} and another --out (the checkpoint of epoch "
            f"{saved[0] + 1}, step {saved[1]} is kept)"
        )
    return TrainError(f"{what} at epoch {at[0] + 1}, step {at[1]}; {remedy}")


def _later(device: torch.device) -> str:
    elsewhere = "" if device.type == "cpu" else ", or now with --resume --device cpu"
    return f"go on with --resume when more memory is free{elsewhere}"
