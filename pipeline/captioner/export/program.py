"""A captioner as one PyTorch module: a photo's pixels in, numbers of words out.

It needs PyTorch alone, so that it can be exported, and so that this file can travel with a model.
Its search has a fixed number of steps and no branches that depend on numbers, and finds what beam
search with early stopping finds: when that would stop, nothing that comes later counts.

    captioner = load("folder")                      # of `cap export --format hf`
    words, scores = captioner(pixels)               # (H, W, 3) uint8
    print(captioner.text(words[0]))
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

PAD, START, END, UNK = 0, 1, 2, 3
_IMPOSSIBLE = float("-inf")


class PhotoCaptioner(nn.Module):
    """network: (B, 3, S, S) normalized floats → (B, feature_dim). config: that of the file
    `captioner.json`.
    """

    _scale: Tensor
    _shift: Tensor

    def __init__(self, network: nn.Module, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        self.network = network
        sizes = config["decoder"]
        embedding, hidden = sizes["embedding_size"], sizes["hidden_size"]
        words = len(config["words"])
        self.project = nn.Linear(sizes["feature_dim"], embedding)
        self.normalize = nn.BatchNorm1d(embedding)
        self.embed = nn.Embedding(words, embedding)
        self.lstm = nn.LSTM(embedding, hidden, sizes["num_layers"], batch_first=True)
        tied = sizes["tie_embeddings"]
        self.transform: nn.Module = nn.Linear(hidden, embedding) if tied else nn.Identity()
        self.head = nn.Linear(embedding if tied else hidden, words)
        if tied:
            self.head.weight = self.embed.weight
        mean, std = (torch.tensor(config["preprocessing"][name]) for name in ("mean", "std"))
        self.register_buffer("_scale", (1 / (255 * std)).view(3, 1, 1), persistent=False)
        self.register_buffer("_shift", (-mean / std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The captions of a photo, best first: (C, T) int64 words, and (C,) scores.

        pixels: (H, W, 3) uint8 RGB, upright. `<end>` and `<pad>` follow the words of a caption.
        A caption that does not exist has the score -inf.
        """
        search = self.config["search"]
        return self._search(self.features(pixels), search["beam_size"], search["captions"])

    def features(self, pixels: Tensor) -> Tensor:
        """(H, W, 3) uint8 → (1, feature_dim), the mean of the views that the model wants."""
        photo = pixels.permute(2, 0, 1).unsqueeze(0)
        size = self.config["image_size"]
        full = self._resized(photo, size)
        views = [full.flip(3) if view == "flip" else full for view in self.config["views"]]
        images = torch.cat(views).float() * self._scale + self._shift
        found: Tensor = (
            self.network(images).half().float()
        )  # caches hold float16, and training saw that
        return found.mean(0, keepdim=True)

    def _resized(self, photo: Tensor, size: int) -> Tensor:
        """(1, 3, H, W) uint8 → (1, 3, size, size), antialiased, in whole levels."""
        kind = self.config["preprocessing"]["filter"]
        if self.config.get("resize") != "products":
            return functional.interpolate(photo, (size, size), mode=kind, antialias=True)
        return resized_by_products(photo, size, kind)

    def _read(self, words: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One step of the LSTM: (B, E) inputs → (B, H) outputs, and each layer's states."""
        after = []
        for layer in range(self.lstm.num_layers):
            hidden, cell = state[2 * layer : 2 * layer + 2]
            weights = self.lstm.all_weights[layer]
            gates = functional.linear(words, weights[0], weights[2])
            gates = gates + functional.linear(hidden, weights[1], weights[3])
            i, f, g, o = gates.chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            words = o.sigmoid() * cell.tanh()
            after += [words, cell]
        return words, after

    def _log_probs(self, outputs: Tensor, words: Tensor, length: int) -> Tensor:
        """(B, W) log-probabilities of the next word, -inf for those that may not follow.

        words: (B, length), the captions so far.
        """
        search = self.config["search"]
        log_probs: Tensor = self.head(self.transform(outputs)).log_softmax(1)
        number = torch.arange(log_probs.shape[1], device=log_probs.device)
        if length == search["max_length"]:
            banned = number != END
        else:
            banned = (number == PAD) | (number == START) | (number == UNK)
            if length == 0:
                banned = banned | (number == END)
        log_probs = log_probs.masked_fill(banned, _IMPOSSIBLE)
        n = search["no_repeat_ngram"]
        if n and length >= n:
            last = length - n + 1  # the first word of the last n-gram to be, one word short
            grams = torch.stack([words[:, k : last + k] for k in range(n)], 2)  # (B, last, n)
            repeats = (grams[:, :, :-1] == words[:, None, last:]).all(2)
            # Where nothing would repeat, this bans <pad>, which is banned anyway.
            following = torch.where(repeats, grams[:, :, -1], PAD)
            log_probs = log_probs.scatter(1, following, _IMPOSSIBLE)
        return log_probs

    def _search(self, features: Tensor, beams: int, count: int) -> tuple[Tensor, Tensor]:
        search, sizes = self.config["search"], self.config["decoder"]
        longest, penalty = search["max_length"], search["length_penalty"]
        photo = self.normalize(self.project(features))  # (1, E)
        zeros = photo.new_zeros(1, sizes["hidden_size"])
        outputs, state = self._read(photo, [zeros] * (2 * sizes["num_layers"]))
        if sizes["start_after_photo"]:
            outputs, state = self._read(self.embed.weight[START : START + 1], state)
        best = photo.new_full((beams,), _IMPOSSIBLE)
        captions = torch.full((beams, longest + 1), PAD, device=photo.device)
        words = torch.zeros((1, 0), dtype=torch.int64, device=photo.device)
        sums = photo.new_zeros(1)
        finished = torch.zeros((), dtype=torch.int64, device=photo.device)
        active = torch.ones((), dtype=torch.bool, device=photo.device)
        order = torch.arange(2 * beams, device=photo.device)
        for length in range(longest + 1):
            log_probs = self._log_probs(outputs, words, length)
            width = log_probs.shape[1]
            each = min(2 * beams, width)
            top, place = (log_probs + sums[:, None]).flatten().topk(each)
            if each < 2 * beams:
                top = functional.pad(top, (0, 2 * beams - each), value=_IMPOSSIBLE)
                place = functional.pad(place, (0, 2 * beams - each))
            parent, word = place // width, place % width
            ends = (word == END) & (top > _IMPOSSIBLE) & active & (order < beams)
            extended = torch.cat([words[parent], word[:, None]], 1)  # (2K, length + 1)

            scores = (top / (length + 1) ** penalty).masked_fill(~ends, _IMPOSSIBLE)
            padded = functional.pad(extended, (0, longest - length), value=PAD)
            best, kept = torch.cat([best, scores[:beams]]).topk(beams)
            captions = torch.cat([captions, padded[:beams]])[kept]
            finished = finished + ends.sum()
            if length == longest:
                break

            # Those that have not ended first, in their order.
            going = (-(order + 2 * beams * (word == END))).topk(beams).indices
            sums = top.masked_fill(word == END, _IMPOSSIBLE)[going]
            divisor = torch.where(finished < beams, longest + 1, length + 2)
            bound = sums.max() / divisor.float() ** penalty
            active = active & (bound > best[count - 1])
            if beams == 1:
                active = active & (finished == 0)
            words, rows = extended[going], parent[going]
            inputs = self.embed(words[:, -1])
            if sizes["photo_every_step"]:
                inputs = inputs + photo
            outputs, state = self._read(inputs, [each[rows] for each in state])
        return captions[:count], best[:count]

    def text(self, words: Sequence[int] | Tensor) -> str:
        """The words of a caption, with spaces between them."""
        numbers = words.tolist() if isinstance(words, Tensor) else list(words)
        end = numbers.index(END) if END in numbers else len(numbers)
        return " ".join(self.config["words"][number] for number in numbers[:end])


def resized_by_products(photo: Tensor, size: int, kind: str) -> Tensor:
    """`interpolate` of PyTorch, (1, 3, H, W) uint8 → (1, 3, size, size), with operations that every
    runtime has; in float64.
    """
    for side in (3, 2):  # across, then down
        weights, one = _filter_weights(torch.arange(photo.shape[side]), size, kind)
        photo = photo.double()
        photo = photo @ weights.T if side == 3 else weights @ photo
        photo = ((photo + one / 2) / one).floor().clamp(0, 255)
    return photo


def _filter_weights(places: Tensor, size: int, kind: str) -> tuple[Tensor, Tensor]:
    """(size, L): what each pixel of a row gives to those of the resized row, in whole parts of a
    power of 2, and that power. places: 0 to L - 1.

    A triangle (bilinear) or a cubic with a = -0.5 (bicubic), as wide as the reduction asks for: the
    filters of Pillow. PyTorch computes with weights of 16 bits, rounded to as many places as the
    largest allows. With the same weights, sums of whole numbers in float64 give its pixels exactly.
    """
    scale = torch.ones_like(places).sum().double() / size  # L is no number yet while this is traced
    wide = scale.clamp(min=1.0)
    centre = (torch.arange(size).double() + 0.5) * scale
    x = ((places.double() + 0.5 - centre[:, None]) / wide).abs()
    if kind == "bilinear":
        weights = (1 - x).clamp(min=0)
    else:
        inner = (1.5 * x - 2.5) * x * x + 1
        outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, inner, torch.where(x < 2, outer, torch.zeros_like(x)))
    weights = weights / weights.sum(1, keepdim=True)
    powers = 2.0 ** torch.arange(1, 23).double()
    one = 2.0 ** ((weights.max() * powers + 0.5).floor() < 2**15).double().sum()
    return weights.sign() * (weights.abs() * one + 0.5).floor(), one


def headless(name: str, image_size: int) -> nn.Module:
    """A network of torchvision, or of timm as `timm:NAME`, without its last layer.

    Some are made for one size of images, and get it.
    """
    if name.startswith("timm:"):
        import timm

        network: nn.Module = timm.create_model(name.removeprefix("timm:"), num_classes=0)
        set_size: Any = getattr(network, "set_input_size", None)
        if set_size is not None:
            set_size(img_size=(image_size, image_size))
        return network
    import torchvision

    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False}
    elif name.startswith("vit_"):
        options = {"image_size": image_size}
    elif name.startswith("maxvit_"):
        options = {"input_size": (image_size, image_size)}
    network = torchvision.models.get_model(name, weights=None, **options)
    last = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    network.set_submodule(last, nn.Identity())
    return network


def load(folder: str | Path) -> PhotoCaptioner:
    """The captioner in a folder with `captioner.json` and `model.safetensors`."""
    from safetensors.torch import load_file

    config = json.loads((Path(folder) / "captioner.json").read_text(encoding="utf-8"))
    captioner = PhotoCaptioner(headless(config["backbone"], config["image_size"]), config)
    tensors = load_file(Path(folder) / "model.safetensors")
    if config["decoder"]["tie_embeddings"]:
        tensors["head.weight"] = tensors["embed.weight"]
    captioner.load_state_dict(tensors)
    return captioner.eval().requires_grad_(False)
