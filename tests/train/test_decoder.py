from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from train.captions.caption_set import Batch
from train.captions.vocabulary import END, PAD, START
from train.model.decoder import CaptionDecoder, DecoderConfig

CONFIG = DecoderConfig(feature_dim=5, vocab_size=9, embedding_size=4, hidden_size=6)


def batch() -> Batch:
    """Captions of three, two and no words (a photo whose caption is `<end>` at once)."""
    generator = torch.Generator().manual_seed(1)
    return Batch(
        features=torch.randn(3, 5, generator=generator).half(),
        inputs=torch.tensor([[4, 5, 6], [7, 8, PAD], [PAD, PAD, PAD]]),
        targets=torch.tensor([[4, 5, 6, END], [7, 8, END, PAD], [END, PAD, PAD, PAD]]),
    )


def textbook_loss(
    weights: dict[str, Tensor], batch: Batch, layers: int, training: bool, photo_every_step: bool
) -> Tensor:
    """The loss computed from the equations, one caption, one step and one gate at a time.

    LSTM as in Hochreiter & Schmidhuber (1997) with forget gates; gate order i, f, g, o.
    """
    projected = batch.features.float() @ weights["project.weight"].T + weights["project.bias"]
    if training:
        mean, variance = projected.mean(0), projected.var(0, unbiased=False)
    else:
        mean, variance = weights["normalize.running_mean"], weights["normalize.running_var"]
    photos = (projected - mean) / (variance + 1e-5).sqrt()
    photos = photos * weights["normalize.weight"] + weights["normalize.bias"]
    losses = []
    for b in range(len(photos)):
        words = [w for w in batch.targets[b].tolist() if w != PAD]
        hidden = [torch.zeros(6) for _ in range(layers)]
        cell = [torch.zeros(6) for _ in range(layers)]
        x = photos[b]
        for word in words:
            for n in range(layers):
                gates = (
                    weights[f"lstm.weight_ih_l{n}"] @ x
                    + weights[f"lstm.bias_ih_l{n}"]
                    + weights[f"lstm.weight_hh_l{n}"] @ hidden[n]
                    + weights[f"lstm.bias_hh_l{n}"]
                )
                i, f, g, o = gates[:6], gates[6:12], gates[12:18], gates[18:]
                cell[n] = torch.sigmoid(f) * cell[n] + torch.sigmoid(i) * torch.tanh(g)
                hidden[n] = torch.sigmoid(o) * torch.tanh(cell[n])
                x = hidden[n]
            logits = weights["head.weight"] @ x + weights["head.bias"]
            losses.append(torch.logsumexp(logits, 0) - logits[word])
            x = weights["embed.weight"][word]
            if photo_every_step:
                x = x + photos[b]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("photo_every_step", [True, False])
def test_loss_and_gradients_are_the_textbooks(
    layers: int, training: bool, photo_every_step: bool
) -> None:
    torch.manual_seed(0)
    decoder = CaptionDecoder(
        DecoderConfig(
            feature_dim=5,
            vocab_size=9,
            embedding_size=4,
            hidden_size=6,
            num_layers=layers,
            photo_every_step=photo_every_step,
        )
    ).train(training)
    buffers = dict(decoder.normalize.named_buffers())
    buffers["running_mean"].uniform_(-1, 1)
    buffers["running_var"].uniform_(0.5, 2)
    weights = {
        name: tensor.detach().clone().requires_grad_(tensor.is_floating_point())
        for name, tensor in decoder.state_dict().items()
        if name != "normalize.num_batches_tracked"
    }
    expected = textbook_loss(weights, batch(), layers, training, photo_every_step)
    expected.backward()
    loss = decoder.loss(batch())
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in decoder.named_parameters():
        expected_gradient = weights[name].grad
        assert parameter.grad is not None
        assert expected_gradient is not None
        assert torch.allclose(parameter.grad, expected_gradient, rtol=1e-4, atol=1e-6), name


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    decoder = CaptionDecoder(CONFIG).eval()
    short = batch()
    padded = Batch(
        short.features,
        torch.nn.functional.pad(short.inputs, (0, 3), value=PAD),
        torch.nn.functional.pad(short.targets, (0, 3), value=PAD),
    )
    torch.testing.assert_close(decoder.loss(short), decoder.loss(padded))


@pytest.mark.parametrize("photo_every_step", [False, True])
def test_one_step_at_a_time_gives_the_same_logits(photo_every_step: bool) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, photo_every_step=photo_every_step, tie_embeddings=True)
    decoder = CaptionDecoder(config).eval()
    whole = decoder(batch().features, batch().inputs)
    assert whole.shape == (3, 4, 9)
    logits, state = decoder.step(decoder.read_photo(batch().features), None)
    torch.testing.assert_close(logits, whole[:, 0])
    for t in range(3):
        logits, state = decoder.step(decoder.embed(batch().inputs[:, t]), state)
        torch.testing.assert_close(logits, whole[:, t + 1])


@pytest.mark.parametrize("photo_every_step", [False, True])
def test_start_after_the_photo_is_a_word_that_predicts_the_first_one(
    photo_every_step: bool,
) -> None:
    torch.manual_seed(0)
    plain = CaptionDecoder(dataclasses.replace(CONFIG, photo_every_step=photo_every_step)).eval()
    config = dataclasses.replace(plain.config, start_after_photo=True)
    decoder = CaptionDecoder(config).eval()
    decoder.load_state_dict(plain.state_dict())
    features, inputs = batch().features, batch().inputs
    start = torch.full((3, 1), START)
    expected = plain(features, torch.cat([start, inputs], 1))[:, 1:]
    torch.testing.assert_close(decoder(features, inputs), expected)
    logits, state = decoder.step(decoder.read_photo(features), None)
    torch.testing.assert_close(logits, expected[:, 0])
    for t in range(3):
        logits, state = decoder.step(decoder.embed(inputs[:, t]), state)
        torch.testing.assert_close(logits, expected[:, t + 1])


def test_the_layerwise_step_is_the_lstms_own() -> None:
    torch.manual_seed(0)
    decoder = CaptionDecoder(dataclasses.replace(CONFIG, num_layers=2)).eval()
    inputs = decoder.read_photo(batch().features)
    outputs, expected = decoder.lstm(inputs.unsqueeze(1))
    for before in (None, expected):
        outputs, (hidden, cell) = decoder.lstm(inputs.unsqueeze(1), before)
        found = decoder._lstm_step(inputs, before)
        torch.testing.assert_close(found, (hidden, cell))
        torch.testing.assert_close(found[0][-1], outputs.squeeze(1))


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    config = DecoderConfig(**(CONFIG.__dict__ | {"dropout": 0.5}))
    decoder = CaptionDecoder(config)
    losses = {decoder.train().loss(batch()).item() for _ in range(3)}
    assert len(losses) == 3
    assert np.ptp([decoder.eval().loss(batch()).item() for _ in range(3)]) == 0
