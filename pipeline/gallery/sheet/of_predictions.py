"""The sheet of predictions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.captioner.predictions import Prediction
from pipeline.gallery.of_predictions import model_name
from pipeline.gallery.sheet.sheet import Tile, check_sheet, write_sheet


class PredictionSheet:
    """A sheet of captions that are being computed."""

    def __init__(self, path: Path, photos: int, model: Path) -> None:
        """photos: how many there will be. Raises SheetError."""
        check_sheet(path, photos)
        self._path, self._model = path, model
        self._tiles: list[Tile] = []

    def add(self, prediction: Prediction) -> None:
        """Show a photo with its captions behind those before it, or say why it has none."""
        path = Path(prediction.path)
        if prediction.error:
            self._tiles.append(Tile(None, (), (f"{path.name}: {prediction.error}",)))
        else:
            said = tuple(caption.caption for caption in prediction.captions)
            self._tiles.append(Tile(path, said))

    def finish(self, report: Callable[[int, int], None] | None = None) -> list[str]:
        """Write the sheet. Returns lines for the user, as `write_sheet`, whose errors it raises."""
        without = any(tile.path is None for tile in self._tiles)
        return write_sheet(
            self._tiles,
            self._path,
            legend=f"captions by {model_name(self._model)}",
            notes_legend="photos that cannot be read" if without else "",
            report=report,
        )
