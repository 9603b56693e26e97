"""torchvision without torch's compiler. Each test uses a new process, because imports persist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def run(code: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return result.stdout.split()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])  # they draw in different ways
def test_a_backbone_is_made_ready_without_torchs_compiler(name: str, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    found = run(
        "import sys, torch\n"
        "from pipeline.encoder.encoder import Encoder\n"
        "from pipeline.encoder.weights import load_backbone\n"
        f"drawn = load_backbone({name!r}, 'random')\n"
        f"torch.save(drawn.network.state_dict(), {str(weights)!r})\n"
        f"backbone = load_backbone({name!r}, {str(weights)!r})\n"
        "encoder = Encoder(backbone, device=torch.device('cpu'), precision='float32')\n"
        "encoder.encode(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))\n"
        "print('torch._dynamo' in sys.modules, 'torch._dynamo.utils' in sys.modules)"
    )
    assert found == ["False", "False"]


def test_what_was_left_out_is_found_when_it_is_called() -> None:
    found = run(
        "from pipeline.encoder.networks.torchvision_models import classifiers\n"
        "models = classifiers()\n"
        "import torch, torchvision\n"
        "from torchvision.ops import roi_align\n"
        "pooled = roi_align(torch.ones(1, 1, 8, 8), [torch.tensor([[0., 0., 4., 4.]])], 2)\n"
        "asked = torchvision.ops.roi_align.__globals__['is_compile_supported']('cpu')\n"
        "import torch._dynamo.utils as true\n"
        "print(float(pooled.sum()), asked == true.is_compile_supported('cpu'))\n"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(())).item())\n"
        "print(models.get_model('resnet18') is not None)"
    )
    assert found == ["4.0", "True", "2.0", "True"]
