"""Compare every classifier of torchvision with the backbone that `cap` makes of it.

    python scripts/compare_backbones.py --out comparison.jsonl

Each network gets random weights, drawn by torchvision, and BatchNorm statistics of seeded pictures.
Residual branches are scaled as training does it: otherwise deep networks are chaotic, and rounding
alone changes their features. The network is saved to a file, as torchvision saves it, and
`load_backbone` loads that file. Then the features of a few pictures are compared: those of
torchvision's own network, by a hook before its last layer, with those of the backbone, plain and
fast, in float32 on the CPU. The network that torchvision builds has the options that it has with
published weights (`transform_input` of two networks).

Results are appended to --out, one JSON object a line; a network that is there already is not
compared again, so the same command goes on after an interruption. At the end a table is printed.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchvision import models
from torchvision.transforms.functional import normalize

from pipeline.encoder.encoder import Encoder
from pipeline.encoder.fusion.batchnorm import BATCHNORMS
from pipeline.encoder.networks.known_backbones import KNOWN_BACKBONES
from pipeline.encoder.networks.random_weights import scale_branches
from pipeline.encoder.precision import encode_plain
from pipeline.encoder.weights import load_backbone

CPU = torch.device("cpu")
WITH_WEIGHTS = {name: {"transform_input": True} for name in ("googlenet", "inception_v3")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--max-mb", type=int, default=1200, help="leave out larger networks")
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("names", nargs="*", help="networks; all by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = {each.name: each.size_mb for each in KNOWN_BACKBONES}
    names = arguments.names or models.list_models(module=models)
    for name in sorted(names, key=lambda each: sizes.get(each, 0)):
        if sizes.get(name, 0) <= arguments.max_mb and name not in _compared(arguments.out):
            result = compare(name, arguments.pictures)
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)
            gc.collect()
    print(table(list(_compared(arguments.out).values())))


def compare(name: str, count: int) -> dict[str, Any]:
    """One network: the least cosine and the largest difference of its features."""
    torch.manual_seed(0)
    reference = models.get_model(name, weights=None, **_options(name)).eval()
    scale_branches(reference)
    _measure(reference, 224 if not name.startswith("inception") else 299)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(reference.state_dict(), path)
        backbone = load_backbone(name, str(path))
    size = backbone.image_size
    pixels = pictures(count, size)
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    expected = _features(reference, normalize(pixels / 255, transforms.mean, transforms.std))
    del reference
    gc.collect()
    plain = encode_plain(backbone, pixels, CPU)
    encoder = Encoder(backbone, device=CPU, precision="float32", image_size=size)
    network = backbone.fast_network(CPU, torch.float32, size)
    encoder.encode(pixels)  # lays out the weights
    start = time.perf_counter()
    fast = encoder.encode(pixels).float()
    elapsed_s = time.perf_counter() - start
    return {
        "name": name,
        "features": backbone.feature_dim,
        "image_size": size,
        "preprocessing": str(backbone.preprocessing),
        "plain_cosine": _least_cosine(plain, expected),
        "plain_difference": float((plain - expected).abs().max()),
        "fast_cosine": _least_cosine(fast, expected),
        "largest_feature": float(expected.abs().max()),
        "traced": isinstance(network, fx.GraphModule),
        "fused": sum(path.startswith("fused_") for path, _ in network.named_children()),
        "convolutions": sum(isinstance(m, nn.Conv2d) for m in backbone.network.modules()),
        "photos_per_s": count / elapsed_s,
    }


def pictures(count: int, size: int) -> Tensor:
    """(count, 3, size, size) uint8: seeded noise with structure at every scale, like photos."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(count, 3, size, size)
    for cells in (4, 8, 16, 32, 64):
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        total += nn.functional.interpolate(noise, (size, size), mode="bicubic")
    return (128 + 40 * total).clamp(0, 255).to(torch.uint8)


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = [
        "| network | features | pixels | plain: cosine | largest difference | fast: cosine | "
        "fused convolutions | photos/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in sorted(results, key=lambda result: str(result["name"])):
        fused = f"{each['fused']} of {each['convolutions']}" if each["traced"] else "not traced"
        relative = each["plain_difference"] / each["largest_feature"]
        lines.append(
            f"| {each['name']} | {each['features']} | {each['image_size']} | "
            f"{each['plain_cosine']:.6f} | {relative:.0e} | {each['fast_cosine']:.6f} | {fused} | "
            f"{each['photos_per_s']:.1f} |"
        )
    return "\n".join(lines)


def _options(name: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(WITH_WEIGHTS.get(name, {}))
    if name in WITH_WEIGHTS:
        options["init_weights"] = True
    return options


def _measure(network: nn.Module, size: int) -> None:
    """Statistics for BatchNorm; with those of its beginning, some networks overflow."""
    batchnorms = [module for module in network.modules() if isinstance(module, BATCHNORMS)]
    for module in batchnorms:
        module.train().momentum = None
    if batchnorms:
        with torch.no_grad():
            network(pictures(4, size) / 64 - 2)
    network.eval()


@torch.inference_mode()
def _features(network: nn.Module, images: Tensor) -> Tensor:
    """What torchvision's network gives to its last layer."""
    seen: list[Tensor] = []
    if isinstance(network, models.SqueezeNet):
        features: Tensor = network.features(images)
        return features.mean((2, 3))
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(images)
    return seen[0]


def _least_cosine(first: Tensor, second: Tensor) -> float:
    return float(torch.cosine_similarity(first.double(), second.double()).min())


def _compared(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    results = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {result["name"]: result for result in results}


if __name__ == "__main__":
    main()
