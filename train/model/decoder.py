"""The caption decoder: a photo's vector in, words out. The plain, readable reference.

    features (B, D) ─ project ─ BatchNorm ─┐
                                           ├─ LSTM ─ (transform) ─ head ─ logits (B, T, W)
    words (B, T - 1) ──── embed ───────────┘

Step 1 reads the photo and predicts the first word; each later step reads the true previous word.
The sizes are those of the classic CNN-LSTM captioner (Vinyals et al., 2015, «Show and Tell»).
With `photo_every_step` each word comes with the photo, which otherwise must be remembered. With
`tie_embeddings` a word is read and written by the same vector (Press & Wolf, 2017), and
`transform` takes the LSTM's outputs to the size of a word.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from train.captions.caption_set import Batch
from train.captions.vocabulary import PAD


@dataclass(frozen=True)
class State:
    """Where the decoding of B captions stands."""

    hidden: Tensor  # (layers, B, H)
    cell: Tensor  # (layers, B, H)
    photo: Tensor  # (B, E), as `read_photo` gave it

    def rows(self, index: Tensor) -> State:
        """The state of these captions, in this order."""
        return State(self.hidden[:, index], self.cell[:, index], self.photo[index])


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; with its weights, all that is needed to rebuild it."""

    feature_dim: int
    vocab_size: int
    embedding_size: int = 256
    hidden_size: int = 512
    num_layers: int = 1
    dropout: float = 0.0  # on the LSTM's inputs and outputs, and between its layers
    feature_dropout: float = 0.0  # on the photo's features
    tie_embeddings: bool = False
    photo_every_step: bool = False  # added to each word that is read, not at step 1 alone


class CaptionDecoder(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(config.feature_dim, config.embedding_size)
        self.normalize = nn.BatchNorm1d(config.embedding_size)
        self.embed = nn.Embedding(config.vocab_size, config.embedding_size)
        self.lstm = nn.LSTM(
            config.embedding_size,
            config.hidden_size,
            config.num_layers,
            batch_first=True,
            dropout=config.dropout if config.num_layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.feature_dropout = nn.Dropout(config.feature_dropout)
        self.transform: nn.Module = nn.Identity()
        if config.tie_embeddings:
            self.transform = nn.Linear(config.hidden_size, config.embedding_size)
            self.head = nn.Linear(config.embedding_size, config.vocab_size)
            self.head.weight = self.embed.weight
            # As a head starts: with an embedding's unit variance the first losses would be huge.
            nn.init.normal_(self.embed.weight, std=config.embedding_size**-0.5)
        else:
            self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, features: Tensor, inputs: Tensor) -> Tensor:
        """Logits of every step: (B, D) features and (B, T - 1) int64 words → (B, T, W)."""
        return self.logits(self.hidden(features, inputs))

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, H) outputs of the LSTM → (…, W)."""
        return self.head(self.transform(hidden))  # type: ignore[no-any-return]

    def hidden(self, features: Tensor, inputs: Tensor) -> Tensor:
        """The LSTM's outputs (B, T, H). Padding follows the words, so it never reaches them."""
        photo = self.read_photo(features).unsqueeze(1)  # (B, 1, E)
        words = self.embed(inputs)
        if self.config.photo_every_step:
            words = words + photo
        steps = torch.cat([photo, words], dim=1)  # (B, T, E)
        outputs, _ = self.lstm(self.dropout(steps))
        return self.dropout(outputs)  # type: ignore[no-any-return]

    def loss(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy per target token; padding counts for nothing."""
        hidden = self.hidden(batch.features, batch.inputs)
        valid = batch.targets != PAD  # (B, T)
        # The head is the largest product: only real targets go through it.
        return cross_entropy(
            self.logits(hidden[valid]), batch.targets[valid], label_smoothing=label_smoothing
        )

    def read_photo(self, features: Tensor) -> Tensor:
        """What the LSTM reads at step 1: (B, D) → (B, E)."""
        features = self.feature_dropout(features.float())
        return self.normalize(self.project(features))  # type: ignore[no-any-return]

    def step(self, inputs: Tensor, state: State | None) -> tuple[Tensor, State]:
        """One step of decoding: (B, E) inputs and the state before → (B, W) logits, state after.

        inputs: from `read_photo` at the first step, without a state; then embedded words.
        """
        photo = inputs if state is None else state.photo
        before = None if state is None else (state.hidden, state.cell)
        if state is not None and self.config.photo_every_step:
            inputs = inputs + photo
        if inputs.is_cuda:
            hidden, cell = self._cells(inputs, before)
            return self.logits(hidden[-1]), State(hidden, cell, photo)
        outputs, (hidden, cell) = self.lstm(inputs.unsqueeze(1), before)
        return self.logits(outputs.squeeze(1)), State(hidden, cell, photo)

    def _cells(self, inputs: Tensor, before: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """One step of the LSTM, layer by layer. cuDNN would gather the weights anew at every step
        where they are not in a buffer of its own. In eval mode: nothing is dropped between layers.
        """
        if before is None:
            zeros = inputs.new_zeros(self.config.num_layers, len(inputs), self.config.hidden_size)
            before = (zeros, zeros)
        states = []
        for n, weights in enumerate(self.lstm.all_weights):
            inputs, cell = torch.lstm_cell(inputs, (before[0][n], before[1][n]), *weights)
            states.append((inputs, cell))
        return torch.stack([state[0] for state in states]), torch.stack([s[1] for s in states])
