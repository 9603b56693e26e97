"""The views of a photo by name. Imports nothing heavy: the command line reads these names."""

from __future__ import annotations

_CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")
VIEWS = ("full", "flip", "center", "center-flip", *_CORNERS)


def parse_views(names: str) -> tuple[str, ...]:
    """`full,flip,corners` → the views' names; `corners` stands for its four.

    Raises ValueError naming an unknown or repeated view.
    """
    views: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name != "corners" and name not in VIEWS:
            raise ValueError(f"unknown view {name!r}; there are {', '.join(VIEWS)} and corners")
        views.extend(_CORNERS if name == "corners" else (name,))
    if len(set(views)) != len(views):
        raise ValueError(f"a view is named twice in {names!r}")
    return tuple(views)
