"""Print the lowest versions that pyproject.toml allows, one a line, as constraints for pip.

`numpy>=2.0` becomes `numpy==2.0`. Covers the dependencies, every extra and the build requirements.
Imports the standard library alone, since it runs before anything is installed.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def lowest(requirement: str) -> str:
    """`name==version` for `name>=version`. Any other form ends the script with a message."""
    name, separator, version = requirement.partition(">=")
    if not separator or not version.replace(".", "").isdigit():
        sys.exit(f"pyproject.toml: {requirement!r} must have the form name>=version")
    return f"{name}=={version}"


def main() -> None:
    document = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    requirements = [
        *document["build-system"]["requires"],
        *document["project"]["dependencies"],
        *(one for extra in document["project"]["optional-dependencies"].values() for one in extra),
    ]
    print("\n".join(sorted({lowest(requirement) for requirement in requirements})))


if __name__ == "__main__":
    main()
