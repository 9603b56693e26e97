"""A run of the CNN-LSTM tutorial, small, with classes of its own: what `cap import-classic` reads.

The names of the parameters, the order of the inputs and the attributes of the vocabulary are the
tutorial's.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models

CAPTIONS = (
    "a dog runs on the beach .",
    "two dogs play with a ball .",
    "the man rides a horse .",
    "a boy jumps into the water .",
    "a red bus .",
    "two women sit on a bench in the park .",
    "a bird sits on a red fence .",
    "the boy plays with two dogs .",
)
SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Vocabulary:
    def __init__(self, words: Sequence[str] = ()) -> None:
        self.word2idx = {word: number for number, word in enumerate(words)}
        self.idx2word = dict(enumerate(words))
        self.idx = len(words)


class Encoder(nn.Module):
    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        *parts, head = network.children()
        assert isinstance(head, nn.Linear)
        self.resnet = nn.Sequential(*parts)
        self.linear = nn.Linear(head.in_features, size)
        self.bn = nn.BatchNorm1d(size, momentum=0.01)

    def pooled(self, pixels: Tensor) -> Tensor:
        """(B, 3, 224, 224), normalized → (B, D)."""
        with torch.no_grad():
            return self.resnet(pixels).flatten(1)  # type: ignore[no-any-return]

    def photo(self, pooled: Tensor) -> Tensor:
        """(B, D) → (B, E)."""
        return self.bn(self.linear(pooled))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    def __init__(self, words: int, size: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, size)
        self.lstm = nn.LSTM(size, hidden, layers, batch_first=True)
        self.linear = nn.Linear(hidden, words)

    def forward(self, photo: Tensor, captions: Tensor) -> Tensor:
        """(B, T, W): the photo predicts `<start>`, each word the next one. captions: (B, T)."""
        inputs = torch.cat([photo.unsqueeze(1), self.embed(captions[:, :-1])], 1)
        logits: Tensor = self.linear(self.lstm(inputs)[0])
        return logits

    @torch.no_grad()
    def say(self, photo: Tensor, steps: int = 20) -> list[list[int]]:
        """Greedy captions: of each step the likeliest word, which the next step reads."""
        said, inputs, state = [], photo.unsqueeze(1), None
        for _ in range(steps):
            outputs, state = self.lstm(inputs, state)
            said.append(self.linear(outputs[:, 0]).argmax(1))
            inputs = self.embed(said[-1]).unsqueeze(1)
        return torch.stack(said, 1).tolist()


@dataclass(frozen=True)
class ClassicRun:
    encoder: Encoder
    decoder: Decoder
    vocabulary: Vocabulary

    def write(self, folder: Path, prefix: str = "", protocol: int = 4) -> list[object]:
        """Write the three files. Returns the options of `cap import-classic` that name them.

        prefix: of the tensors' names. protocol: of the vocabulary's pickle.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name, module in (("encoder", self.encoder), ("decoder", self.decoder)):
            state = {prefix + key: value for key, value in module.state_dict().items()}
            torch.save(state, folder / f"{name}-5-36.ckpt")
        (folder / "vocab.pkl").write_bytes(pickle.dumps(self.vocabulary, protocol))
        files = ("encoder-5-36.ckpt", "decoder-5-36.ckpt", "vocab.pkl")
        flags = ("--encoder", "--decoder", "--vocab")
        return [
            each for flag, name in zip(flags, files, strict=True) for each in (flag, folder / name)
        ]

    def captions(self, paths: Sequence[Path]) -> list[list[str]]:
        """The words that the tutorial's own search finds for photos, with `<start>` and `<end>`."""
        return self.captions_of(self.encoder.pooled(pixels_of(paths)))

    def captions_of(self, pooled: Tensor) -> list[list[str]]:
        """The same of photos' features (B, D)."""
        found = []
        for numbers in self.decoder.say(self.encoder.photo(pooled)):
            words = [self.vocabulary.idx2word[number] for number in numbers]
            found.append(words[: words.index("<end>") + 1] if "<end>" in words else words)
        return found


def pixels_of(paths: Sequence[Path]) -> Tensor:
    """(B, 3, 224, 224) normalized pixels of photos of that size."""
    photos = []
    for path in paths:
        with Image.open(path) as photo:
            resized = photo.convert("RGB").resize((224, 224), Image.Resampling.LANCZOS)
        photos.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1))
    scaled = torch.stack(photos).float() / 255
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def write_photos(folder: Path) -> list[Path]:
    """One for each caption, 224×224 without loss, so that no program has to resize it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(len(CAPTIONS))]
    for number, path in enumerate(paths):
        coarse = np.random.default_rng(number).integers(0, 256, (7, 7, 3), np.uint8)
        Image.fromarray(coarse).resize((224, 224), Image.Resampling.BICUBIC).save(path)
    return paths


def random_run(
    *, words: Sequence[str] | None = None, layers: int = 1, size: int = 16, hidden: int = 24
) -> ClassicRun:
    """Untrained, with a ResNet-18. words: the vocabulary in its order, special words among them."""
    torch.manual_seed(0)
    known = sorted({word for caption in CAPTIONS for word in caption.split()})
    vocabulary = Vocabulary(words or (*SPECIALS, *known))
    encoder = Encoder(models.resnet18(weights=None), size)
    decoder = Decoder(len(vocabulary.word2idx), size, hidden, layers)
    return ClassicRun(encoder.eval(), decoder.eval(), vocabulary)


def reordered(run: ClassicRun, words: Sequence[str]) -> ClassicRun:
    """The same run with another order of the same words."""
    order = [run.vocabulary.word2idx[word] for word in words]
    decoder = copy.deepcopy(run.decoder)
    with torch.no_grad():
        for rows in (decoder.embed.weight, decoder.linear.weight, decoder.linear.bias):
            rows.copy_(rows[order])
    return ClassicRun(run.encoder, decoder, Vocabulary(words))


def trained_run(paths: Sequence[Path], steps: int = 150) -> ClassicRun:
    """Trained as the tutorial trains, until it knows the CAPTIONS of these photos."""
    run = random_run()
    encoder, decoder, number = run.encoder, run.decoder, run.vocabulary.word2idx
    rows = [
        [number[word] for word in ("<start>", *caption.split(), "<end>")] for caption in CAPTIONS
    ]
    longest = max(map(len, rows))
    captions = torch.tensor([row + [number["<pad>"]] * (longest - len(row)) for row in rows])
    encoder.train().pooled(pixels_of(paths))  # BatchNorms measure the photos
    pooled = encoder.eval().pooled(pixels_of(paths))
    parameters = [
        *decoder.parameters(), *encoder.linear.parameters(), *encoder.bn.parameters()
    ]  # fmt: skip
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    encoder.bn.train()
    encoder.bn.momentum = 0.1  # so that few steps measure enough
    for _ in range(steps):
        logits = decoder(encoder.photo(pooled), captions)
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            logits.flatten(0, 1), captions.flatten(), ignore_index=number["<pad>"]
        ).backward()
        optimizer.step()
    encoder.bn.eval()
    return run
