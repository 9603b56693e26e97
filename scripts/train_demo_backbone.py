#!/usr/bin/env python
"""Train the demo's backbone, a small torchvision network, to recognize objects in drawn scenes.

The training scenes have seeds from 1,000,000 on; the demo's own scenes have smaller ones. The
pooled features must contain everything that a caption says. Linear heads on them are therefore
trained to name each object in caption order (noun, colour, size), the layout and the place. The
heads are then discarded, and the backbone is saved as a float16 state dict. The first epochs use
scenes of half the size, which take a quarter of the time. Takes about a quarter of an hour on two
cores.

    python scripts/train_demo_backbone.py --out pipeline/demo/demo_backbone.pth
"""

from __future__ import annotations

import argparse
import io
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision import models

from pipeline.demo.painting import COLORS, NOUNS
from pipeline.demo.scenes import LAYOUTS, PLACES, draw_scene
from pipeline.encoder.encoder import normalizer
from pipeline.photos.preprocessing import IMAGENET, preprocess

BACKBONE = "shufflenet_v2_x0_5"
FIRST_SEED = 1_000_000
SLOTS = 3
# Classes of each head; in a slot, class 0 is "no such object".
HEADS = {
    **{
        f"{kind} {slot}": size
        for slot in range(SLOTS)
        for kind, size in (("noun", len(NOUNS) + 1), ("color", len(COLORS) + 1), ("size", 3))
    },
    "layout": len(LAYOUTS),
    "place": len(PLACES),
}


def labelled_scene(seed: int) -> tuple[NDArray[np.uint8], list[int]]:
    """((3, 224, 224) uint8 pixels as extraction reads them, the class for each head)."""
    scene = draw_scene(seed)
    buffer = io.BytesIO()
    scene.image.save(buffer, "JPEG", quality=90)
    labels = []
    for slot in range(SLOTS):
        if slot < len(scene.objects):
            drawn = scene.objects[slot]
            labels.append(1 + NOUNS.index(drawn.noun))
            labels.append(1 + list(COLORS).index(drawn.color))
            labels.append(1 + ("small", "large").index(drawn.size))
        else:
            labels += [0, 0, 0]
    labels += [LAYOUTS.index(scene.layout), list(PLACES).index(scene.place)]
    return preprocess(buffer.getvalue(), 224)[0].numpy(), labels


def labelled_scenes(first_seed: int, count: int) -> tuple[Tensor, Tensor]:
    """((N, 3, 224, 224) uint8, (N, heads) int64)."""
    with ProcessPoolExecutor() as pool:
        drawn = list(pool.map(labelled_scene, range(first_seed, first_seed + count), chunksize=64))
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in drawn]))
    return pixels, torch.tensor([labels for _, labels in drawn])


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The share of correct answers of each head."""
    parts = logits.split(list(HEADS.values()), dim=1)
    return {
        name: float((part.argmax(1) == labels[:, i]).float().mean())
        for i, (name, part) in enumerate(zip(HEADS, parts, strict=True))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=9_000)
    parser.add_argument("--half-size-epochs", type=int, default=9)
    parser.add_argument("--full-size-epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    arguments = parser.parse_args()

    pixels, labels = labelled_scenes(FIRST_SEED, arguments.scenes)
    unseen_pixels, unseen_labels = labelled_scenes(2 * FIRST_SEED, 1000)
    print(f"drew {len(pixels):,} scenes", flush=True)
    torch.manual_seed(0)
    backbone = models.get_model(BACKBONE, weights=None)
    head = nn.Linear(backbone.fc.in_features, sum(HEADS.values()))
    backbone.fc = nn.Identity()
    network = nn.Sequential(backbone, head)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.02)
    steps = len(pixels) // arguments.batch_size
    epochs = arguments.half_size_epochs + arguments.full_size_epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.learning_rate, total_steps=steps * epochs
    )
    normalize = normalizer(torch.device("cpu"), torch.float32, IMAGENET)
    started = time.perf_counter()
    for epoch in range(epochs):
        half_size = epoch < arguments.half_size_epochs
        network.train()
        order = torch.randperm(len(pixels))
        for step in range(steps):
            chosen = order[step * arguments.batch_size : (step + 1) * arguments.batch_size]
            images = normalize(pixels[chosen]).contiguous()
            if half_size:
                images = nn.functional.avg_pool2d(images, 2)
            head_logits = network(images).split(list(HEADS.values()), dim=1)
            loss = torch.stack(
                [
                    nn.functional.cross_entropy(part, labels[chosen, i], label_smoothing=0.02)
                    for i, part in enumerate(head_logits)
                ]
            ).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.inference_mode():
            logits = torch.cat(
                [
                    network(nn.functional.avg_pool2d(images, 2) if half_size else images)
                    for images in map(normalize, unseen_pixels.split(100))
                ]
            )
        shares = accuracy(logits, unseen_labels)
        print(
            f"epoch {epoch}: loss {loss.item():.3f}, unseen scenes "
            + ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
            + f", {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        state = {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in backbone.state_dict().items()
        }
        torch.save(state, arguments.out)


if __name__ == "__main__":
    main()
