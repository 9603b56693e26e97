"""Export: a trained model and its encoder as a program, or as a folder for a model hub.

| format | what it is | what runs it |
|---|---|---|
| `pt2` | a program of `torch.export`, with `captioner.json` in it | PyTorch |
| `onnx` | an ONNX model, with `captioner.json` in its metadata | any ONNX runtime |
| `hf` | a folder: weights, `captioner.json`, a model card, code | PyTorch, torchvision or timm |

All compute in float32. A program computes the encoder's features as `Captioner` does; the words can
differ where two captions are equally likely, because the last digits do.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cache.errors import CapError
from pipeline.captioner.export import program
from pipeline.captioner.export.card import model_card
from pipeline.captioner.export.program import PhotoCaptioner
from pipeline.encoder.encoder import load_recorded
from pipeline.photos.preprocessing import Preprocessing
from train.captions.views import chosen_view, views_to_read
from train.captions.vocabulary import SPECIALS
from train.config import SearchConfig, check_search, with_enough_beams
from train.model.bundle import Bundle, find_bundle, load_bundle
from train.torch_import import import_meta_kernels

PT2, ONNX, HF = "pt2", "onnx", "hf"
FORMATS = (PT2, ONNX, HF)
FACTS = "captioner.json"
_VERSION = 1
_OPSET = 18
# A photo to trace with: its sides differ from each other and from any network's.
_EXAMPLE = (251, 347, 3)
_MOST_PIXELS = 1 << 15  # of a side


class ExportError(CapError):
    """Raised when a model cannot be exported. The message is one line."""


def format_of(out: Path) -> str:
    """The format that a file's suffix names; `hf` for a folder. Raises ExportError."""
    if out.suffix in (".pt2", ".onnx"):
        return out.suffix[1:]
    if out.is_dir() or not out.suffix:
        return HF
    raise ExportError(f"{out}: the suffix is neither .pt2 nor .onnx; name one of them, or --format")


def export(
    model: Path,
    out: Path,
    search_config: SearchConfig,
    *,
    kind: str,
    weights: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a model with its encoder to `out`. Returns the facts in `captioner.json`.

    kind: of FORMATS. weights: as for `Captioner.load`. Raises ExportError (what the format cannot
    hold, a file in the way, a missing library), BundleError, EncoderError, SearchError or
    ViewError.
    """
    if os.path.lexists(out) and not overwrite:
        raise ExportError(f"{out}: exists; name another --out, or --overwrite")
    if not out.absolute().parent.is_dir():
        raise ExportError(f"{out.absolute().parent}: no such folder")
    if kind == ONNX:
        _check_onnx()
    model_file = find_bundle(model)
    bundle = load_bundle(model_file)
    captioner, facts = photo_captioner(bundle, model_file, search_config, weights=weights)
    if kind == ONNX:
        captioner.config["resize"] = facts["resize"] = "products"
    writers: dict[str, Callable[[PhotoCaptioner, dict[str, Any], Path], None]] = {
        PT2: _write_pt2,
        ONNX: _write_onnx,
        HF: _write_folder,
    }
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    try:
        written = folder / out.name
        writers[kind](captioner, facts, written)
        if out.is_dir() and not out.is_symlink():
            _check_own(out)
            shutil.rmtree(out)
        os.replace(written, out)
    except OSError as error:
        raise ExportError(f"{out}: cannot write ({error.strerror or error})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return facts


def photo_captioner(
    bundle: Bundle, model_file: Path, search_config: SearchConfig, *, weights: str | None = None
) -> tuple[PhotoCaptioner, dict[str, Any]]:
    """(the model with its encoder as one module, on the CPU in eval mode; what is known of it).

    Raises ExportError, EncoderError, SearchError or ViewError.
    """
    search_config, _ = with_enough_beams(search_config)
    check_search(search_config)
    search_config = search_config.up_to(bundle.vocabulary.longest)
    if search_config.sample or search_config.groups > 1:
        raise ExportError("a program searches with one group of beams, and does not draw captions")
    record = bundle.encoder
    view = chosen_view(search_config.view, record.views, bundle.training)
    views = views_to_read(record.views, view)
    if not set(views) <= {"full", "flip"}:
        raise ExportError(
            f"the model captions from the views {', '.join(views)}; a program makes full and flip"
        )
    preprocessing = Preprocessing.parse(record.preprocessing)
    if preprocessing is None:
        raise ExportError(f"this version does not know the preprocessing {record.preprocessing!r}")
    facts: dict[str, Any] = {
        "version": _VERSION,
        "backbone": record.backbone,
        "weights": Path(record.weights).name,
        "weights_sha256": record.weights_sha256,
        "image_size": record.image_size,
        "views": list(views),
        "preprocessing": dataclasses.asdict(preprocessing),
        "decoder": dataclasses.asdict(bundle.decoder.config),
        "search": {
            "beam_size": search_config.beam_size,
            "captions": search_config.captions,
            "max_length": search_config.longest,
            "length_penalty": search_config.length_penalty,
            "no_repeat_ngram": search_config.no_repeat_ngram,
        },
        "tokenizer": bundle.vocabulary.tokenizer,
        "words": [*SPECIALS, *bundle.vocabulary.words],
        "training": _finite(bundle.training),
    }
    network = load_recorded(record, weights, model_file).network
    captioner = PhotoCaptioner(network, facts)
    captioner.load_state_dict(
        {
            **{f"network.{name}": each for name, each in network.state_dict().items()},
            **bundle.decoder.state_dict(),
        }
    )
    return captioner.eval().requires_grad_(False), facts


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which are no JSON."""
    if isinstance(value, dict):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _exported(captioner: PhotoCaptioner) -> torch.export.ExportedProgram:
    import_meta_kernels()  # the compiler needs them before its own modules
    height, width = (
        torch.export.Dim(name, min=2, max=_MOST_PIXELS) for name in ("height", "width")
    )
    example = torch.zeros(_EXAMPLE, dtype=torch.uint8)
    try:
        with torch.no_grad():
            return torch.export.export(
                captioner, (example,), dynamic_shapes={"pixels": {0: height, 1: width}}
            )
    except Exception as error:  # whatever a network's code raises when it is traced
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        backbone = captioner.config["backbone"]
        raise ExportError(f"{backbone}: torch.export cannot trace it ({reason})") from None


def _write_pt2(captioner: PhotoCaptioner, facts: dict[str, Any], out: Path) -> None:
    exported = _exported(captioner)
    torch.export.save(exported, out, extra_files={FACTS: json.dumps(facts)})


def _check_onnx() -> None:
    try:
        import onnx
        import onnxscript
    except ImportError:
        raise ExportError("ONNX needs two libraries: pip install 'cap[onnx]'") from None
    del onnx, onnxscript


def _write_onnx(captioner: PhotoCaptioner, facts: dict[str, Any], out: Path) -> None:
    import onnx

    # The exporter tells the user what it does, by way of warnings and logging.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            _exported(captioner),
            dynamo=True,
            optimize=False,  # takes four times as long as all the rest; runtimes optimize, too
            opset_version=_OPSET,
            input_names=["pixels"],
            output_names=["words", "scores"],
            verbose=False,
        )
    assert made is not None
    made.save(out)
    model = onnx.load(out)
    entry = model.metadata_props.add()
    entry.key, entry.value = FACTS, json.dumps(facts)
    onnx.save(model, out)


def _write_folder(captioner: PhotoCaptioner, facts: dict[str, Any], out: Path) -> None:
    from safetensors.torch import save_file

    _check_rebuilt(captioner, facts)
    out.mkdir()
    tensors = {name: each.contiguous() for name, each in captioner.state_dict().items()}
    if facts["decoder"]["tie_embeddings"]:
        del tensors["head.weight"]  # the same as embed.weight
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (out / "config.json").write_text(
        json.dumps({"architectures": ["PhotoCaptioner"], "model_type": "cap-cnn-lstm"}) + "\n"
    )
    shutil.copyfile(program.__file__, out / "captioner.py")
    (out / "README.md").write_text(model_card(facts), encoding="utf-8")


def _check_rebuilt(captioner: PhotoCaptioner, facts: dict[str, Any]) -> None:
    """Raise ExportError unless `captioner.py` makes the network again from its name."""
    shapes = {name: each.shape for name, each in captioner.network.state_dict().items()}
    try:
        with torch.device("meta"):
            network = program.headless(facts["backbone"], facts["image_size"])
    except Exception:  # a network that only this project can build, such as a file of one's own
        again = None
    else:
        again = {name: each.shape for name, each in network.state_dict().items()}
    if again != shapes:
        raise ExportError(
            f"{facts['backbone']}: a folder cannot name this network; use --format pt2"
        )


def _check_own(out: Path) -> None:
    """Raise ExportError if a folder holds anything that an export does not write."""
    own = {"model.safetensors", FACTS, "config.json", "captioner.py", "README.md"}
    others = sorted({path.name for path in out.iterdir()} - own)
    if others:
        raise ExportError(f"{out}: holds {others[0]}, which no export wrote; name another --out")
