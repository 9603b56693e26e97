"""SPICE (Anderson et al., 2016), computed by its Java program, where that can run.

pycocoevalcap contains the program, but not the parser that it needs, Stanford CoreNLP 3.6.0.
pycocoevalcap's own wrapper downloads the parser unasked and writes into the installed package. Here
nothing is downloaded, and all files are temporary. For that reason parses are not cached (`-cache`)
either. That would also fail under Java 16 and later, because the program's serializer reads Java's
internal classes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.scores.java import java_version, package_folder, run_java

_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_LAST_JAVA = 14  # the program needs the JavaScript engine, which Java 15 removed
_TIMEOUT_S = 6 * 3600.0  # it parses every reference: some tens of them per second and core


def missing_requirement() -> str | None:
    """Why SPICE cannot be computed here, in one line; None if nothing known prevents it.

    Raises nothing. If the program fails nevertheless, `spice` finds out.
    """
    folder = package_folder() / "spice" / "lib"
    if not all((folder / name).is_file() for name in _MODELS):
        return (
            f"Stanford CoreNLP 3.6.0 is missing or incomplete in {folder} "
            "(pycocoevalcap.spice.get_stanford_models downloads it)"
        )
    version = java_version()
    if version is not None and version > _LAST_JAVA:
        return f"its program needs Java 8 to {_LAST_JAVA}, `java` is version {version}"
    return None


def spice(
    references: Mapping[str, list[str]], hypotheses: Mapping[str, list[str]]
) -> NDArray[np.float64]:
    """(N,) F-score of each image; SPICE is their mean.

    Needs up to 8 GB of memory. Raises OSError, SubprocessError or ValueError if the program fails
    or gives an invalid answer.
    """
    items = [
        {"image_id": str(number), "test": hypotheses[image][0], "refs": references[image]}
        for number, image in enumerate(hypotheses)
    ]
    with tempfile.TemporaryDirectory() as name:
        captions, scores = Path(name, "captions.json"), Path(name, "scores.json")
        captions.write_text(json.dumps(items), encoding="utf-8")
        run_java(
            ["-Xmx8G", "-jar", "spice-1.0.jar", str(captions), "-out", str(scores), "-silent"],
            [],
            package_folder() / "spice",
            timeout_s=_TIMEOUT_S,
        )
        return _parse_scores(scores.read_text(encoding="utf-8"), len(items))


def _parse_scores(answer: str, count: int) -> NDArray[np.float64]:
    """(count,) F-scores from the program's JSON about images 0, 1, …. Raises ValueError."""
    try:
        scores = {
            int(item["image_id"]): float(item["scores"]["All"]["f"]) for item in json.loads(answer)
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"unexpected answer ({error})") from None
    if scores.keys() != set(range(count)):
        raise ValueError(f"{len(scores)} scores came back for {count}")
    return np.array([scores[number] for number in range(count)])
