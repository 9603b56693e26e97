"""SPICE (Anderson et al., 2016), by its Java program, where its parser's models are present.

pycocoevalcap carries the program but not Stanford CoreNLP 3.6.0, which parses for it. Its own
wrapper downloads that unasked and writes beside the installed package; here nothing is downloaded
and the files it needs are temporary.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from train.java import package_folder, run_java

_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def missing_models() -> list[Path]:
    """The jars that SPICE needs and that are not where it looks for them."""
    folder = package_folder() / "spice" / "lib"
    return [folder / name for name in _MODELS if not (folder / name).is_file()]


def spice(references: Mapping[str, list[str]], hypotheses: Mapping[str, list[str]]) -> float:
    """Mean F-score over the images, as pycocoevalcap's.

    Raises OSError, SubprocessError or ValueError if the program fails or its answer is none.
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
        )
        answers = json.loads(answered.read_text(encoding="utf-8"))
    try:
        scores = [float(answer["scores"]["All"]["f"]) for answer in answers]
    except (KeyError, TypeError) as error:
        raise ValueError(f"unexpected answer ({error})") from None
    if len(scores) != len(items):
        raise ValueError(f"{len(scores)} scores came back for {len(items)}")
    return sum(scores) / len(scores)
