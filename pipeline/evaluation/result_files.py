"""The files that `cap evaluate` writes: how they are called, and what they say they are of.

Results of different models, caches and searches have different names. A name that is taken by
results of something else, such as another cache of the same name, gets digits at its end.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from cache.atomic import WriteError, write_text
from cache.store import FeatureCache
from train.config import SearchConfig

_DIGITS = 8


def result_files(
    model: Path,
    cache: FeatureCache,
    search: SearchConfig,
    *,
    out: Path | None = None,
    only: Path | None = None,
) -> tuple[Path, Path, str]:
    """(the file of scores, the file of predictions, what they are of, in hexadecimal digits).

    model: a model file. search: as it was asked for. out: the folder of the files; None for that of
    the model. only: the list of photos that were scored.
    """
    parts = [model.stem, cache.path.stem, *([only.stem] if only is not None else [])]
    if out is not None:  # where files of several runs may be
        parts.insert(0, model.resolve().parent.name)
    name = ".".join([*parts, search_name(search)])
    of = _digest(model, cache, only)
    folder = model.parent if out is None else out
    scores = folder / f"{name}.scores.json"
    if _of(scores) not in (None, of):
        name = f"{name}-{of[:_DIGITS]}"
        scores = folder / f"{name}.scores.json"
    return scores, folder / f"{name}.predictions.json", of


def search_name(search: SearchConfig) -> str:
    """`beam3`, `sample-seed7`, `beam5-length_penalty0.7`: all that is not the default."""
    usual = SearchConfig()
    parts = ["sample" if search.sample else f"beam{search.beam_size}"]
    for field in fields(search):
        value = getattr(search, field.name)
        if field.name not in ("sample", "beam_size") and value != getattr(usual, field.name):
            parts.append(
                f"{field.name}{value:g}" if isinstance(value, float) else f"{field.name}{value}"
            )
    return "-".join(parts)


def _digest(model: Path, cache: FeatureCache, only: Path | None) -> str:
    """Equal for a model file that was trained again, and for a cache that was copied."""
    listed = b"" if only is None else only.read_bytes()
    names = (str(model.resolve()), cache.photos_sha256, cache.captions_sha256)
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape") + listed).hexdigest()


def _of(scores: Path) -> str | None:
    """What a file of scores is of; None if there is none, and an empty string if it is no such."""
    try:
        content = json.loads(scores.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return ""
    return str(content.get("of", "")) if isinstance(content, dict) else ""


def write_results(
    files: tuple[Path, Path, str],
    model: Path,
    cache: FeatureCache,
    search: SearchConfig,
    scores: dict[str, Any],
    predictions: list[dict[str, Any]],
) -> WriteError | None:
    """Write both files, and make their folder. Returns the error if that fails."""
    scores_file, predictions_file, of = files
    facts = {"model": model.name, "cache": cache.path.name, "of": of, **asdict(search), **scores}
    try:
        scores_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(scores_file, facts)
        write_json(predictions_file, predictions)
    except WriteError as error:
        return error
    except OSError as error:
        return WriteError(f"{scores_file.parent}: cannot make the folder ({error.strerror})")
    return None


def write_json(path: Path, value: object) -> None:
    """Raises WriteError."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        text = json.dumps(value, indent=1)  # bytes of names that are not UTF-8, as \udc80
    write_text(path, text + "\n")
