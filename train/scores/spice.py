"""SPICE (Anderson et al., 2016), by its Java program, where it can run.

pycocoevalcap carries the program but not Stanford CoreNLP 3.6.0, which parses for it. Its own
wrapper downloads that unasked and writes beside the installed package; here nothing is downloaded
and the files it needs are temporary. For the same reason parses are not kept (`-cache`), which
would also fail under Java 16 and later: the program's serializer reaches into Java's own classes.
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
_LAST_JAVA = 14  # the program writes its answer by the JavaScript engine that Java 15 dropped
_TIMEOUT_S = 6 * 3600.0  # it parses every reference: some tens a second on a core


def obstacle() -> str | None:
    """Why SPICE cannot be computed here, in a line; None if nothing speaks against it.

    Raises nothing; a program that fails all the same is found out by `spice`.
    """
    folder = package_folder() / "spice" / "lib"
    if not all((folder / name).is_file() for name in _MODELS):
        return (
            f"Stanford CoreNLP 3.6.0 is not whole in {folder} "
            "(pycocoevalcap.spice.get_stanford_models downloads it)"
        )
    version = java_version()
    if version is not None and version > _LAST_JAVA:
        return f"its program needs Java 8 to {_LAST_JAVA}, `java` is {version}"
    return None


def spice(
    references: Mapping[str, list[str]], hypotheses: Mapping[str, list[str]]
) -> NDArray[np.float64]:
    """(N,) F-score of each image; SPICE is their mean.

    Needs up to 8 GB of memory. Raises OSError, SubprocessError or ValueError if the program fails
    or its answer is none.
    """
    items = [
        {"image_id": str(number), "test": hypotheses[image][0], "refs": references[image]}
        for number, image in enumerate(hypotheses)
    ]
    with tempfile.TemporaryDirectory() as name:
        asked, answered = Path(name, "captions.json"), Path(name, "scores.json")
        asked.write_text(json.dumps(items), encoding="utf-8")
        run_java(
            ["-Xmx8G", "-jar", "spice-1.0.jar", str(asked), "-out", str(answered), "-silent"],
            [],
            package_folder() / "spice",
            timeout_s=_TIMEOUT_S,
        )
        return _f_scores(answered.read_text(encoding="utf-8"), len(items))


def _f_scores(answer: str, count: int) -> NDArray[np.float64]:
    """(count,) of the program's JSON, which names the images 0, 1, … Raises ValueError."""
    try:
        scores = {
            int(item["image_id"]): float(item["scores"]["All"]["f"]) for item in json.loads(answer)
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"unexpected answer ({error})") from None
    if scores.keys() != set(range(count)):
        raise ValueError(f"{len(scores)} scores came back for {count}")
    return np.array([scores[number] for number in range(count)])
