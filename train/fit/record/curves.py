"""Draws the curves of a run's log as a picture, and those of several runs over one another.

matplotlib is used through its objects, without pyplot, and with its own settings whatever the
user's are, so that a picture looks the same everywhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from cache.atomic import write_atomically
from cache.errors import CapError
from train.fit.record.metrics import Curves, StepPoint, read_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Corner = Literal["upper right", "upper left", "lower left"]

_MARK = "cap training curves"  # in our pictures, which alone are replaced
_SIZE, _DPI = (11.0, 7.2), 100  # inches; 1100 × 720 pixels
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#2563a8", "#d9730d", "#3b8f4a", "#b8302a", "#6b6f76"
_COLOURS = (_BLUE, _ORANGE, _GREEN, _RED, "#7b52ab", "#8c5a3c", "#c8559b", "#1f9aa8")
_DASHES = ("-", "--", ":", "-.")
_MOST_POINTS = 600  # of a line; more would be drawn over one another
_NAMED_RUNS = 16  # of a picture of several runs; the others are grey
_NAME_LENGTH = 44
# Fonts with more scripts than matplotlib's own, which has no Chinese, Japanese, Korean, Thai, …
_WIDE_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP"),
    *("Noto Sans Thai", "Noto Sans Devanagari", "Noto Sans Arabic", "WenQuanYi Zen Hei"),
    *("WenQuanYi Micro Hei", "Droid Sans Fallback", "IPAGothic", "Unifont"),
)


class CurvesError(CapError):
    """Raised when a picture cannot be drawn. The message is one line that begins with the file."""


@dataclass(frozen=True)
class PlottedRun:
    """One of several runs in a picture."""

    name: str
    group: int  # runs that are judged alike have the same number
    folder: Path


@dataclass(frozen=True)
class _Line:
    """The curves of one of several runs."""

    name: str
    group: int
    curves: Curves


def draw_run(run: Path, picture: Path) -> bool:
    """Draw the curves of a run's folder. Returns whether there was anything to draw.

    Raises CurvesError or WriteError.
    """
    curves = read_curves(run / "metrics.jsonl")
    if not curves.steps and not curves.epochs:
        return False
    check_replaceable(picture)
    name = run.absolute().name
    with own_matplotlib([name]):
        _save(_run_figure(name, curves), picture)
    return True


def draw_runs(runs: Sequence[PlottedRun], picture: Path) -> int:
    """Draw the curves of several runs over one another, the first ones named.

    Returns how many runs had something to draw. Raises CurvesError, if none has, or WriteError.
    """
    check_replaceable(picture)
    lines = []
    for run in runs:
        curves = read_curves(run.folder / "metrics.jsonl")
        if curves.steps or curves.epochs:
            lines.append(_Line(run.name, run.group, curves))
    if not lines:
        raise CurvesError(f"{picture}: not drawn, because no run has a log (metrics.jsonl)")
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CurvesError(f"{picture}: cannot make its folder ({error.strerror})") from None
    with own_matplotlib([line.name for line in lines]):
        _save(_runs_figure(lines), picture)
    return len(lines)


def check_replaceable(picture: Path) -> None:
    """Raise CurvesError unless a picture can be written there, in the place of no other file."""
    if picture.suffix.lower() != ".png":
        raise CurvesError(f"{picture}: pictures are PNG; name a file that ends in .png")
    if picture.exists() and not is_ours(picture):
        raise CurvesError(f"{picture}: is no picture that cap has drawn; move it away")


def is_ours(picture: Path) -> bool:
    """Whether a file is a picture that was drawn here."""
    try:
        with picture.open("rb") as file:
            return _MARK.encode() in file.read(1024)
    except OSError:
        return False


def serve(run: str) -> None:
    """Draw a run's curves for each line of standard input, and answer each with a line."""
    with contextlib.suppress(OSError):
        os.nice(5)  # training goes first
    with contextlib.suppress(ImportError):
        import matplotlib.backends.backend_agg  # noqa: F401  # now, while nobody waits
    for _ in sys.stdin:
        try:
            draw_run(Path(run), Path(run) / "curves.png")
            answer = "drawn"
        except Exception as error:  # whatever it is, training goes on
            answer = f"failed: {' '.join(str(error).split()) or type(error).__name__}"
        print(answer, flush=True)


@contextlib.contextmanager
def own_matplotlib(texts: Sequence[str]) -> Iterator[None]:
    """A context in which matplotlib has its own settings, finds a font for the texts, and says
    nothing: of a font cache, of a home that it cannot write to, of letters that no font has.
    """
    os.environ["MPLBACKEND"] = "agg"  # another one, of the user's, might not even be installed
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                import matplotlib as mpl
                from matplotlib import font_manager
            except (ImportError, OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise CurvesError(f"matplotlib: cannot be used ({reason})") from None
            fonts = ["DejaVu Sans"]  # comes with matplotlib
            if any(ord(letter) > 0x58F for text in texts for letter in text):
                there = {font.name for font in font_manager.fontManager.ttflist}
                fonts += [name for name in _WIDE_FONTS if name in there]
            with mpl.rc_context({**mpl.rcParamsDefault, "font.family": fonts, "font.size": 10.0}):
                yield
    finally:
        log.setLevel(level)


def _save(figure: Figure, picture: Path) -> None:
    def write(temporary: Path) -> None:
        figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": _MARK})

    write_atomically(picture, write)


def _run_figure(name: str, curves: Curves) -> Figure:
    figure, panels = _figure(f"{_shown(name)}{_best(curves)}")
    loss, perplexity, scores, rate = panels
    crossed = [point for point in curves.steps if not point.rewarded]
    rewarded = [point for point in curves.steps if point.rewarded]
    at = [point.at for point in curves.epochs]
    style: dict[str, Any] = {"marker": "o", "markersize": 3.5, "linewidth": 1.6}

    smoothed = any(point.smoothed for point in crossed)
    label = "training, smoothed targets" if smoothed else "training"
    _steps(loss, crossed, "loss", label=label, color=_GREY)
    loss.plot(at, [e.val_loss for e in curves.epochs], label="validation", color=_BLUE, **style)
    _titled(loss, "Loss (mean cross-entropy per word)")

    _steps(perplexity, crossed, "perplexity", label="training", color=_GREY)
    values = [float(np.exp(min(e.val_loss, 700.0))) for e in curves.epochs]
    perplexity.plot(at, values, label="validation", color=_BLUE, **style)
    _titled(perplexity, "Perplexity")
    _log_scale(perplexity)

    scored = [e for e in curves.epochs if e.cider is not None]
    if scored:
        ciders = [100 * (e.cider or 0.0) for e in scored]
        scores.plot([e.at for e in scored], ciders, label="CIDEr", color=_ORANGE, **style)
    with_bleu = [e for e in curves.epochs if e.bleu_4 is not None]
    if with_bleu:
        bleu = [100 * (e.bleu_4 or 0.0) for e in with_bleu]
        scores.plot([e.at for e in with_bleu], bleu, label="BLEU-4", color=_GREEN, **style)
    if rewarded:
        x, y = _thinned([p.at for p in rewarded], [-100 * p.loss for p in rewarded])
        scores.plot(x, y, label="reward, of training photos", color=_GREY, linewidth=1.1)
    _titled(scores, "Scores of the validation photos, times 100")

    for points in (crossed, rewarded):  # the rate jumps between them
        _steps(rate, points, "learning_rate", color=_RED)
    _titled(rate, "Learning rate")
    rate.set_ylim(bottom=0)
    # A place that a good run leaves free; to look for the best place would take time.
    places: tuple[_Corner, ...] = ("upper right", "upper right", "upper left", "lower left")
    for axes, place in zip(panels, places, strict=True):
        if axes.lines:
            _mark_epochs(axes, curves, rewarded, named=axes is loss)
        _finish(axes, legend=place)
    return figure


def _best(curves: Curves) -> str:
    best = [epoch for epoch in curves.epochs if epoch.best]
    if not best:
        return ""
    cider = "" if best[-1].cider is None else f", CIDEr {100 * best[-1].cider:.1f}"
    return f": best epoch {best[-1].at:.0f}, validation loss {best[-1].val_loss:.4f}{cider}"


def _mark_epochs(axes: Axes, curves: Curves, rewarded: Sequence[StepPoint], *, named: bool) -> None:
    """Mark the epoch whose model is the best one, and the self-critical epochs.

    named: in the legend, of which one says enough.
    """
    best = [epoch for epoch in curves.epochs if epoch.best]
    if best:
        label = "best epoch" if named else None
        axes.axvline(best[-1].at, color="#20242a", linewidth=0.9, linestyle=":", label=label)
    if rewarded:
        first, last = np.floor(rewarded[0].at - 1e-9), np.ceil(rewarded[-1].at)
        label = "self-critical epochs" if named else None
        axes.axvspan(first, last, color="#f3ead6", zorder=0, label=label)


def _runs_figure(lines: Sequence[_Line]) -> Figure:
    count = f"{len(lines)} run{'' if len(lines) == 1 else 's'}"
    figure, (cider, val_loss, loss, rate) = _figure(count)
    handles = {}
    groups = list(dict.fromkeys(line.group for line in lines))
    for number, line in reversed(list(enumerate(lines))):  # the first ones on top
        named = number < _NAMED_RUNS
        colour = _COLOURS[number % len(_COLOURS)] if named else "#c4c7cc"
        style: dict[str, Any] = {
            "color": colour,
            "linewidth": 1.5 if named else 0.8,
            "linestyle": _DASHES[groups.index(line.group) % len(_DASHES)],
        }
        # Where the colours come a second time, other dots tell the runs apart.
        dots: dict[str, Any] = {"marker": "os"[number // len(_COLOURS) % 2], "markersize": 3.5}
        if not named:
            dots = {}
        epochs, steps = line.curves.epochs, line.curves.steps
        scored = [e for e in epochs if e.cider is not None]
        ciders = [100 * (e.cider or 0.0) for e in scored]
        cider.plot([e.at for e in scored], ciders, **style, **dots)
        losses = [e.val_loss for e in epochs]
        (drawn,) = val_loss.plot([e.at for e in epochs], losses, **style, **dots)
        _steps(loss, [p for p in steps if not p.rewarded], "loss", **style)
        for points in ([p for p in steps if not p.rewarded], [p for p in steps if p.rewarded]):
            _steps(rate, points, "learning_rate", **style)
        if named:
            handles[number] = drawn
    _titled(cider, "CIDEr of the validation photos, times 100")
    _titled(val_loss, "Validation loss (mean cross-entropy per word)")
    _titled(loss, "Training loss")
    _titled(rate, "Learning rate")
    rate.set_ylim(bottom=0)
    for axes in (cider, val_loss, loss, rate):
        _finish(axes)
    names = [f"{number + 1}.  {_shown(lines[number].name)}" for number in sorted(handles)]
    left_out = len(lines) - len(handles)
    title = None
    if len(groups) > 1:
        title = "Runs with different lines (solid, dashed, …) were judged differently"
    if left_out:
        title = "; ".join([*([title] if title else []), f"{left_out} more are grey"])
    columns = 2 if max(map(len, names)) > 30 else 3
    figure.legend(
        [handles[number] for number in sorted(handles)],
        names,
        loc="outside lower center",
        ncols=min(columns, len(names)),
        title=title,
        frameon=False,
        fontsize=9,
    )
    return figure


def _figure(title: str) -> tuple[Figure, list[Axes]]:
    """A figure of four panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure, list(figure.subplots(2, 2, sharex=True).flat)


def _steps(axes: Axes, points: Sequence[StepPoint], name: str, **style: Any) -> None:
    """A line of one of the values of the log lines; no line if they do not have it."""
    found = [(p.at, getattr(p, name)) for p in points if getattr(p, name) is not None]
    if found:
        x, y = _thinned([at for at, _ in found], [value for _, value in found])
        axes.plot(x, y, **({"linewidth": 1.1} | style))


def _thinned(
    x: Sequence[float], y: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two lists of at most `_MOST_POINTS` numbers: means of neighbours."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    if len(xs) <= _MOST_POINTS:
        return xs, ys
    starts = np.linspace(0, len(xs), _MOST_POINTS, endpoint=False).astype(int)
    counts = np.diff([*starts, len(xs)])
    return np.add.reduceat(xs, starts) / counts, np.add.reduceat(ys, starts) / counts


def _titled(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10.5, loc="left")


def _log_scale(axes: Axes) -> None:
    """A logarithmic scale, with plain numbers, where the values are far apart."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    values = [value for line in axes.lines for value in np.asarray(line.get_ydata(), float)]
    if not values or max(values) < 8 * min(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _finish(axes: Axes, *, legend: _Corner | None = None) -> None:
    """legend: its place; None: no legend."""
    from matplotlib.ticker import MaxNLocator

    axes.grid(color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set_xlim(left=0)
    axes.set_xlabel("epochs")
    axes.tick_params(labelbottom=True)
    if not axes.lines:
        axes.set_yticks([])
        axes.text(
            *(0.5, 0.5, "not in the log"),
            ha="center",
            va="center",
            color=_GREY,
            transform=axes.transAxes,
        )
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(loc=legend, fontsize=8.5, framealpha=0.8, edgecolor="none")


def _shown(name: str) -> str:
    r"""A name as a title or legend can show it: short, on a line, and not read as a formula."""
    plain = name.encode("utf-8", "backslashreplace").decode("utf-8")  # a name that is not UTF-8
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain)
    if len(plain) > _NAME_LENGTH:
        half = _NAME_LENGTH // 2
        plain = f"{plain[:half]}…{plain[-half:]}"
    return plain.replace("$", r"\$")
