"""What is inside a file or a folder, as facts by name: of a cache, a model, a run, …

Facts of the same name mean the same for every kind. They are plain values, which JSON can hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.errors import CapError
from pipeline.inspection.kinds import Kind, kind_of

if TYPE_CHECKING:
    from cache.store import FeatureCache

Facts = dict[str, Any]

_WRITTEN = ("best.cap", "last.cap", "checkpoint.pt", "metrics.jsonl", "curves.png")


class ContentError(CapError):
    """Raised for a file or folder that cannot be shown. The message is one line."""


def facts_of(path: Path) -> Facts:
    """What is inside a file or folder that is no captions file.

    Raises ContentError, CacheError, BundleError, EncoderError, RunsError or FolderError.
    """
    kind = kind_of(path)
    show = {
        Kind.CACHE: cache_facts,
        Kind.MODEL: model_facts,
        Kind.RUN: run_facts,
        Kind.SWEEP: sweep_facts,
        Kind.CHECKPOINT: checkpoint_facts,
        Kind.WEIGHTS: weights_facts,
        Kind.PICTURE: picture_facts,
        Kind.FOLDER: folder_facts,
    }.get(kind)
    if show is None:
        raise ContentError(f"{path}: {_why_not(path, kind)}")
    return {"kind": kind.name.lower(), **show(path)}


def _why_not(path: Path, kind: Kind) -> str:
    if kind is Kind.ABSENT:
        return "no such file or folder"
    try:
        if path.stat().st_size == 0:
            return "is empty"
        if path.is_file():
            path.open("rb").close()
    except OSError as error:
        return f"cannot read ({error.strerror})"
    return f"is {kind.value}"


def cache_facts(path: Path) -> Facts:
    from cache.store import DONE, PENDING, open_cache

    opened = open_cache(path, allow_pending=True)
    return {
        "photos": len(opened),
        "done": len(opened.rows_with(DONE)),
        "pending": len(opened.rows_with(PENDING)),
        "unreadable": len(opened.errors()),
        "captions": opened.caption_count,
        "distinct_words": opened.word_count,
        "tokenizer": opened.tokenizer,
        "size_bytes": path.stat().st_size,
        **_shard_facts(opened),
        **asdict(opened.encoder),
        "batch_rows": opened.batch_rows,
        **({"shard": str(opened.shard)} if opened.shard else {}),
        "library_versions": opened.library_versions,
    }


def _shard_facts(opened: FeatureCache) -> Facts:
    if opened.shards is None:
        return {}
    listed = opened.shards.listed
    return {"listed_caches": len(listed), "listed_bytes": sum(item.size_bytes for item in listed)}


def model_facts(path: Path) -> Facts:
    """Of a model file: its encoder, decoder, vocabulary and training. The weights are not read."""
    from train.model.bundle import BundleError, read_record

    record = read_record(path)
    try:
        vocabulary, training = record["vocabulary"], record["training"]
        epoch = training.get("epoch")
        return {
            "size_bytes": path.stat().st_size,
            **record["encoder"],
            **{name: value for name, value in record["decoder"].items() if name != "feature_dim"},
            "words": len(vocabulary["words"]),  # `vocab_size` counts four special ones, too
            "min_count": vocabulary["min_count"] or None,  # 0: not known, of an imported model
            "tokenizer": vocabulary.get("tokenizer", "treebank"),
            "captions": training.get("captions"),
            # Epochs are counted from 0 in the file.
            "epoch": None if epoch is None else epoch + 1,
            "val_loss": training.get("val_loss"),
            **{f"val_{name}": value for name, value in (training.get("scores") or {}).items()},
            **({"doubt": training["degenerate"]} if training.get("degenerate") else {}),
            **(
                {"imported": dict(training["imported"])}
                if training.get("imported")
                else {"training": dict(training.get("config") or {})}
            ),
        }
    except (KeyError, TypeError, AttributeError):
        raise BundleError(f"{path}: damaged model file (its record is invalid)") from None


def run_facts(path: Path) -> Facts:
    """Of a run's folder: its model and how far training is."""
    from train.fit.record.run_table import find_runs
    from train.model.bundle import find_bundle

    run = next(run for run in find_runs(path) if run.path == path)
    files = [name for name in _WRITTEN if (path / name).is_file()]
    facts: Facts = {
        "files": ", ".join(files),
        "epochs_done": run.epochs,
        "resumable": (path / "checkpoint.pt").is_file(),
    }
    if run.problem:
        return facts
    model = find_bundle(path)
    return {**facts, "model": model.name, **model_facts(model)}


def sweep_facts(path: Path) -> Facts:
    from train.fit.record.run_table import find_runs, score_key

    runs = find_runs(path)
    best = max(runs, key=score_key)  # all trials of a sweep are judged alike
    return {
        "trials": len(runs),
        "best": str(best.path),
        "best_val_cider": best.cider,
        "best_training": dict(best.settings),
    }


def checkpoint_facts(path: Path) -> Facts:
    """Of a run's checkpoint, whatever it is called: where training goes on, and by which settings.

    Its tensors are not read.
    """
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {
            "size_bytes": path.stat().st_size,
            "format_version": state["version"],
            "epochs_done": state["epoch"],
            "steps_of_next_epoch": state["step"],
            "data": {name: str(value) for name, value in state["data"].items()},
            "training": dict(state["settings"]),
        }
    except Exception as error:  # torch.load raises a dozen types for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ContentError(f"{path}: cannot read ({reason[:120]})") from None


def weights_facts(path: Path) -> Facts:
    from pipeline.encoder.networks.files.weights_files import read_weights_file

    state = read_weights_file(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    names = list(shapes)
    return {
        "size_bytes": path.stat().st_size,
        "tensors": len(shapes),
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "first": f"{names[0]} {list(shapes[names[0]])}" if names else "",
        "last": f"{names[-1]} {list(shapes[names[-1]])}" if names else "",
    }


def picture_facts(path: Path) -> Facts:
    from PIL import Image

    try:
        with Image.open(path) as image:
            shape: Facts = {"format": image.format, "width": image.width, "height": image.height}
    except Exception as error:  # Pillow raises a dozen types for damaged files
        raise ContentError(f"{path}: a picture that cannot be read ({error})") from None
    return {"size_bytes": path.stat().st_size, **shape}


def folder_facts(path: Path) -> Facts:
    """Of a folder of photos, of runs, or of both."""
    from pipeline.photos.folder import list_photos

    found = list_photos(path)
    runs = sorted({file.parent for file in path.glob("*/*.cap")})
    return {
        "photos": len(found.paths),
        **({"first": found.paths[0]} if found.paths else {}),
        **({"left_out": dict(found.left_out)} if found.left_out else {}),
        **({"runs": len(runs)} if runs else {}),
    }


def json_facts(path: Path) -> Facts | None:
    """Of a JSON file that a command of ours wrote; None if it is another text."""
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, Mapping):
        return None
    if {"bleu_4", "cider", "count"} <= content.keys():
        return {"kind": "scores", **content}
    if {"words", "counts", "min_count"} <= content.keys():
        rest = {name: content[name] for name in ("min_count", "tokenizer") if name in content}
        return {"kind": "vocabulary", "words": len(content["words"]), **rest}
    return None


def facts_table(facts: Facts) -> str:
    """A line for each fact. A fact that has parts has them in one line."""
    known = [(name, value) for name, value in facts.items() if value is not None]
    width = max(len(name) for name, _ in known)
    return "\n".join(f"{name:<{width}} {_line(name, value)}" for name, value in known)


def _line(name: str, value: Any) -> str:
    if name.endswith(("bleu_4", "cider")) and isinstance(value, float):  # as everywhere
        return f"{100 * value:.2f} (times 100)"
    return _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
