"""The caption decoder: reads a photo's features, writes words. The plain, readable reference.

    features (B, D) ─ project ─ BatchNorm ─┐
                                           ├─ LSTM ─ (transform) ─ head ─ logits (B, T, W)
    words (B, T - 1) ──── embed ───────────┘

Step 1 reads the photo and predicts the first word. Each later step reads the true previous word.
The default sizes are those of the classic CNN-LSTM captioner (Vinyals et al., 2015, «Show and
Tell»). With `photo_every_step` the photo is added to every word, so that the LSTM need not remember
it. With `start_after_photo` step 1 reads the photo and then `<start>`. With `tie_embeddings` the
same vector serves to read and to predict a word (Press & Wolf, 2017), and `transform` maps the
LSTM's outputs to the size of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from train.captions.caption_set import Batch
from train.captions.vocabulary import PAD, START
from train.config import Recipe

# Standard deviation of the first word vectors that are tied, to which a photo of 1 may be added. At
# the usual 0.04 the photo hides the words for long: 225 photos still say «a a a .» after 500 steps.
_TIED_SCALE = 0.2


@dataclass(frozen=True)
class DecoderState:
    """The state of decoding B captions, between two steps."""

    hidden: Tensor  # (layers, B, H)
    cell: Tensor  # (layers, B, H)
    photo: Tensor  # (B, E), from `read_photo`

    def rows(self, index: Tensor) -> DecoderState:
        """The state of these captions, in this order."""
        return DecoderState(self.hidden[:, index], self.cell[:, index], self.photo[index])


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes and options of a decoder: with the weights, all that is needed to rebuild it."""

    feature_dim: int
    vocab_size: int
    embedding_size: int = 256
    hidden_size: int = 512
    num_layers: int = 1
    dropout: float = 0.0  # on the LSTM's inputs and outputs, and between its layers
    feature_dropout: float = 0.0  # on the photo's features
    tie_embeddings: bool = False
    photo_every_step: bool = False  # the LSTM reads the photo with every word, not only at step 1
    # At step 1 the LSTM reads the photo and then <start>. No recipe trains that, only others have:
    # `cap import-classic`. Their models predict <start> after the photo, which is no word.
    start_after_photo: bool = False

    @classmethod
    def of_recipe(cls, recipe: Recipe, *, feature_dim: int, vocab_size: int) -> DecoderConfig:
        """The decoder that a recipe trains, for features (…, D) and a vocabulary of W words."""
        return cls(
            feature_dim=feature_dim,
            vocab_size=vocab_size,
            embedding_size=recipe.embedding_size,
            hidden_size=recipe.hidden_size,
            num_layers=recipe.num_layers,
            dropout=recipe.dropout,
            feature_dropout=recipe.feature_dropout,
            tie_embeddings=recipe.tie_embeddings,
            photo_every_step=recipe.photo_every_step,
        )


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
            # Larger than the usual scale of a head, so that the LSTM can tell words apart from the
            # first step on. An embedding's unit variance would make early losses huge.
            nn.init.normal_(self.embed.weight, std=_TIED_SCALE)
        else:
            self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, features: Tensor, inputs: Tensor) -> Tensor:
        """Logits of every step: (B, D) features and (B, T - 1) int64 words → (B, T, W)."""
        return self.logits(self.hidden(features, inputs))

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, H) outputs of the LSTM → (…, W) logits."""
        return self.head(self.transform(hidden))  # type: ignore[no-any-return]

    def hidden(self, features: Tensor, inputs: Tensor) -> Tensor:
        """The LSTM's outputs (B, T, H). Padding comes after the words, so it cannot affect them."""
        photo = self.read_photo(features).unsqueeze(1)  # (B, 1, E)
        before = int(self.config.start_after_photo)  # outputs before that of step 1
        words = self.embed(nn.functional.pad(inputs, (before, 0), value=START))
        if self.config.photo_every_step:
            words = words + photo
        steps = torch.cat([photo, words], dim=1)  # (B, before + T, E)
        outputs, _ = self.lstm(self.dropout(steps))
        return self.dropout(outputs[:, before:])  # type: ignore[no-any-return]

    def loss(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy per target token, without padding."""
        hidden = self.hidden(batch.features, batch.inputs)
        valid = batch.targets != PAD  # (B, T)
        # The head is the largest matrix product, so it gets real targets only.
        return cross_entropy(
            self.logits(hidden[valid]), batch.targets[valid], label_smoothing=label_smoothing
        )

    def read_photo(self, features: Tensor) -> Tensor:
        """(B, D) features → (B, E), which the LSTM reads at step 1."""
        features = self.feature_dropout(features.float())
        return self.normalize(self.project(features))  # type: ignore[no-any-return]

    def step(self, inputs: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        """Decode one step. Returns (B, W) logits and the state after the step.

        inputs: (B, E), from `read_photo` at the first step, where the state is None; then embedded
        words.
        """
        hidden, state = self.step_hidden(inputs, state)
        return self.logits(hidden), state

    def step_hidden(
        self, inputs: Tensor, state: DecoderState | None
    ) -> tuple[Tensor, DecoderState]:
        """`step`, with the LSTM's outputs (B, H) in place of their logits."""
        outputs, next_state = self._read(inputs, state)
        if state is None and self.config.start_after_photo:
            start = self.embed.weight[START].expand(len(inputs), -1)
            outputs, next_state = self._read(start, next_state)
        return outputs, next_state

    def _read(self, inputs: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        """The LSTM's outputs (B, H) of one input (B, E), and the state after it."""
        photo = inputs if state is None else state.photo
        lstm_state = None if state is None else (state.hidden, state.cell)
        if state is not None and self.config.photo_every_step:
            inputs = inputs + photo
        hidden, cell = self._lstm_step(inputs, lstm_state)
        return hidden[-1], DecoderState(hidden, cell, photo)

    def _lstm_step(
        self, inputs: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """One step of the LSTM, from inputs (B, E): the hidden and cell states (layers, B, H)."""
        if not inputs.is_cuda:
            _, (hidden, cell) = self.lstm(inputs.unsqueeze(1), state)
            return hidden, cell
        # On a GPU layer by layer, without dropout between layers. The parameters are not in a
        # buffer of cuDNN's own, so `nn.LSTM` would copy all weights into one at every step.
        if state is None:
            zeros = inputs.new_zeros(self.config.num_layers, len(inputs), self.config.hidden_size)
            state = (zeros, zeros)
        hiddens, cells = [], []
        for hidden, cell, weights in zip(*state, self.lstm.all_weights, strict=True):
            inputs, cell = torch.lstm_cell(inputs, (hidden, cell), *weights)
            hiddens.append(inputs)
            cells.append(cell)
        return torch.stack(hiddens), torch.stack(cells)
