"""All parameters of a decoder in one buffer, all gradients in another.

A step can then update, clip, average or convert all weights in one pass over memory, whatever the
number of layers. The decoder keeps its parameters, which become views of the buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from train.model.decoder import CaptionDecoder

# oneDNN's kernels are fastest if the number of words fills their registers.
_WORDS_MULTIPLE = 16
_SUMS = 16  # room beside the gradients, which keeps them aligned
IMPOSSIBLE_LOGIT = -1e4  # its exponential is zero, its difference to any other logit finite


@dataclass(frozen=True)
class _Place:
    start: int
    size: int
    shape: tuple[int, ...]  # of the memory, which may be padded and transposed
    transposed: bool
    words: int | None  # the parameter's rows (columns, if transposed); the others are padding


class FlatParameters:
    """Moves a decoder's parameters into `values` and their `.grad` into `gradients`, in place.

    Both are (P,) float32 on the decoder's device. `gradients_and_sums`, (P + 16,), is the memory of
    `gradients` with room behind it for what is summed together with them over several processes.
    Matrices come first, `values[:matrices]`, then
    biases and BatchNorm. Word matrices are padded to a multiple of 16 words with zeros, the output
    bias with −10,000. The padding words therefore have no probability, and their gradients stay
    zero.

    transposed: store the matrices of products as (in, out), with which products and weight
    gradients are faster on a CPU. The decoder's parameters keep their shape (out, in).
    """

    def __init__(self, decoder: CaptionDecoder, *, transposed: bool) -> None:
        config = decoder.config
        self.padded_words = -(-config.vocab_size // _WORDS_MULTIPLE) * _WORDS_MULTIPLE
        named = dict(decoder.named_parameters())
        names = sorted(named, key=lambda name: named[name].dim() < 2)  # stable: matrices first
        self._places: dict[str, _Place] = {}
        start = 0
        for name in names:
            shape = tuple(named[name].shape)
            words = None
            if name in ("embed.weight", "head.weight", "head.bias"):
                words, shape = shape[0], (self.padded_words, *shape[1:])
            turned = transposed and len(shape) == 2 and name != "embed.weight"
            memory = shape[::-1] if turned else shape
            size = torch.Size(memory).numel()
            self._places[name] = _Place(start, size, memory, turned, words)
            start += -(-size // _WORDS_MULTIPLE) * _WORDS_MULTIPLE
            if len(shape) == 2:
                self.matrices = start
        device = next(iter(named.values())).device
        self.values = torch.zeros(start, device=device)
        self.gradients_and_sums = torch.zeros(start + _SUMS, device=device)
        self.gradients = self.gradients_and_sums[:start]
        if "head.bias" in named:
            self.memory("head.bias", self.values).fill_(IMPOSSIBLE_LOGIT)
        for name, parameter in named.items():
            view = self.view(name, self.values)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = self.view(name, self.gradients)

    def names(self) -> list[str]:
        return list(self._places)

    def memory(self, name: str, buffer: Tensor) -> Tensor:
        """A parameter's part of a buffer laid out as `values`: padded, and maybe (in, out)."""
        place = self._places[name]
        return buffer[place.start : place.start + place.size].view(place.shape)

    def view(self, name: str, buffer: Tensor) -> Tensor:
        """A parameter's part of a buffer laid out as `values`, in the decoder's shape."""
        place = self._places[name]
        memory = self.memory(name, buffer)
        if place.transposed:
            memory = memory.t()
        return memory if place.words is None else memory[: place.words]

    def matrix(self, name: str, buffer: Tensor) -> Tensor:
        """A weight's part of a buffer laid out as `values`, for products: (in, out), padded."""
        memory = self.memory(name, buffer)
        return memory if self._places[name].transposed else memory.t()

    def named(self, buffer: Tensor) -> dict[str, Tensor]:
        """Copies of a buffer's parts on the CPU, by parameter name: plain tensors to save."""
        # `torch.save` writes the whole buffer behind a view, so each part gets memory of its own.
        return {
            name: self.view(name, buffer)
            .detach()
            .to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name in self._places
        }

    def load(self, tensors: Mapping[str, Tensor], buffer: Tensor) -> None:
        """Restore what `named` returned. Raises KeyError or RuntimeError if it does not fit."""
        for name in self._places:
            self.view(name, buffer).copy_(tensors[name])
