"""The model card of an exported folder."""

from __future__ import annotations

from typing import Any

_CARD = """---
pipeline_tag: image-to-text
library_name: pytorch
tags:
- image-captioning
- cnn-lstm
---

# A captioner of photos

A frozen {backbone} turns a photo into {features:,} numbers, and an LSTM writes a caption from them.
It was made with `cap`.

## Use

```python
import numpy as np
from PIL import Image

from captioner import load  # the file beside this one; needs torch, safetensors and {library}

captioner = load(".")
pixels = np.array(Image.open("photo.jpg").convert("RGB"))
words, scores = captioner(torch.from_numpy(pixels))
print(captioner.text(words[0]))
```

## What it learned from

{data}

## What it reaches

{scores}

## The encoder

{backbone} with weights {weights} (SHA-256 of their numbers: {sha256}), {views} at
{size}×{size} pixels. The licence of these weights is that of whoever published them; look it up
before you pass this folder on.

## Limits

- It knows {words:,} words, and says what the captions of its photos said. Of other photos it says
  the most similar thing that it knows, and does not say that it is unsure.
- What the captions say of people, it says too, with their errors and their prejudices.
"""


def model_card(facts: dict[str, Any]) -> str:
    """The card in Markdown, with what is known of the model; what is not known is said, too."""
    training = facts["training"]
    settings, reached = training.get("config") or {}, training.get("scores") or {}
    data = [
        f"- {text}: {values[name]:,}"
        for text, values, name in (
            ("captions", training, "captions"),
            ("epochs trained", training, "epoch"),
            ("captions per step", settings, "batch_size"),
            ("seed", settings, "seed"),
        )
        if isinstance(values.get(name), int)
    ]
    scores = [
        f"- {text}: {factor * values[name]:.{digits}f}"
        for text, values, name, factor, digits in (
            ("CIDEr, times 100", reached, "cider", 100, 1),
            ("BLEU-4, times 100", reached, "bleu_4", 100, 1),
            ("cross-entropy per word", training, "val_loss", 1, 3),
        )
        if isinstance(values.get(name), int | float)
    ]
    if scores and isinstance(reached.get("count"), int):
        scores.insert(
            0, f"On {reached['count']:,} validation photos, which chose the model, too:\n"
        )
    backbone = facts["backbone"]
    return _CARD.format(
        backbone=backbone,
        features=facts["decoder"]["feature_dim"],
        library="timm" if backbone.startswith("timm:") else "torchvision",
        data="\n".join(data) or "Not recorded.",
        scores="\n".join(scores) or "Not recorded.",
        weights=facts["weights"],
        sha256=facts["weights_sha256"],
        views=" and ".join(facts["views"]),
        size=facts["image_size"],
        words=len(facts["words"]) - 4,
    ).replace("from PIL import Image\n\nfrom", "import torch\nfrom PIL import Image\n\nfrom")
