"""A decoder whose weights lie as oneDNN wants them, for search on a CPU.

A step of search multiplies a few rows by all weights, so its time goes into reading those. The
product that PyTorch calls (MKL's) is two to five times as slow, and `nn.LSTM` converts its weights
at every call. A photo's 21 steps with 9,948 words took 104 ms on two cores without bfloat16, and
219 ms with three beams; with this decoder they take 43 and 81 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.model.decoder import CaptionDecoder
from train.private_torch import laid_out_linear, lay_out_linear_weight

# Rows that the layout is for. It is as good for all numbers of rows that search has, from one photo
# in greedy search to 128 with beams.
_ROWS = 16

# (weight (N, K) in oneDNN's layout, bias (N,))
_Laid = tuple[Tensor, Tensor]


def for_search(decoder: CaptionDecoder) -> CaptionDecoder:
    """A decoder that computes the steps of this one, up to rounding, and as fast as we know.

    It is for search, in eval mode, as long as the weights stay as they are. On a GPU, in training
    mode, or of a decoder that this function returned, it is the decoder itself. Making one takes
    15 to 30 ms for 9,948 words, and the memory of the weights once more.
    """
    packed = isinstance(decoder, PackedDecoder)
    if packed or decoder.training or decoder.embed.weight.device.type != "cpu":
        return decoder
    return PackedDecoder(decoder)


class PackedDecoder(CaptionDecoder):
    """Shares another decoder's modules, and copies the weights of its large products."""

    def __init__(self, decoder: CaptionDecoder) -> None:
        nn.Module.__init__(self)
        self.config = decoder.config
        self.project, self.normalize = decoder.project, decoder.normalize
        self.embed, self.feature_dropout = decoder.embed, decoder.feature_dropout
        self.train(False)
        with torch.no_grad():
            # One product for inputs and hidden state: (4H, E + H).
            self._gates = [
                _laid(torch.cat([w_inputs, w_hidden], 1), b_inputs + b_hidden)
                for w_inputs, w_hidden, b_inputs, b_hidden in decoder.lstm.all_weights
            ]
            self._output = [
                _laid(each.weight, each.bias)
                for each in (decoder.transform, decoder.head)
                if isinstance(each, nn.Linear)  # else it is the identity
            ]

    def logits(self, hidden: Tensor) -> Tensor:
        for weight, bias in self._output:
            hidden = laid_out_linear(hidden, weight, bias)
        return hidden

    def _lstm_step(
        self, inputs: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if state is None:
            zeros = inputs.new_zeros(self.config.num_layers, len(inputs), self.config.hidden_size)
            state = (zeros, zeros)
        hiddens, cells = [], []
        for hidden, cell, (weight, bias) in zip(*state, self._gates, strict=True):
            gates = laid_out_linear(torch.cat([inputs, hidden], 1), weight, bias)
            i, f, g, o = gates.chunk(4, 1)
            cell = torch.addcmul(i.sigmoid() * g.tanh(), f.sigmoid(), cell)
            inputs = o.sigmoid() * cell.tanh()
            hiddens.append(inputs)
            cells.append(cell)
        return torch.stack(hiddens), torch.stack(cells)


def _laid(weight: Tensor, bias: Tensor) -> _Laid:
    return lay_out_linear_weight(weight.detach(), _ROWS), bias.detach()
