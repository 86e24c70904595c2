"""One look for every figure: the same size, fonts and, for a method, the same colour, marker and dash everywhere."""

from __future__ import annotations

import io
import math
import os
import tempfile
import textwrap
import zlib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorakit.errors import ParameterError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH = 6.5  # inches: the text width of a page, and 780 pixels in a notebook
SCREEN_DPI, PRINT_DPI = 120, 200

RC: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same picture on every machine
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlepad": 9,  # room for a mark on the top edge
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 3.2,  # long enough to tell the dashes apart
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}

# Okabe & Ito's colours for all kinds of colour vision, but yellow, which paper swallows; then mostly Paul Tol's.
COLORS = (
    *("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#882255", "#999933", "#777777"),
    *("#332288", "#AA4499", "#44AA99", "#7A5230"),
    # the gates' rows: ungated runs dark or blue, rates of 50 % pale
    *("#222222", "#4477AA", "#66CCEE", "#228833", "#CCBB44", "#6F4FA8", "#EE7733", "#BBBBBB", "#D4709A"),
    # the tokens' rows: dark in mode "fractional", pale in mode "gather"
    *("#8C6D31", "#4D4D4D", "#C4420B", "#5E3C99", "#01665E", "#A0A0A0", "#F4A07A", "#B2A0DD", "#6CC4B4", "#1F4E8C"),
    "#7F3B08",
)
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SPARE_MARKERS = ("<", ">", "p", "*", "h", "d", "8")  # once every marker was drawn with every dash
PLACES = 2 * len(MARKERS) * len(DASHES)  # 7 and 4 have no common factor

X_LABELS = {
    "accepted_steps": "accepted steps",
    "steps": "steps",
    "tokens": "tokens seen",
    "tokens_backpropagated": "tokens backpropagated",
    "flops": "training compute (FLOPs)",
    "seconds": "training time (s)",
}


class Look(NamedTuple):
    """How one method is drawn; in grey print `marker` and `dash` together still name it."""

    label: str
    color: str
    marker: str
    dash: Any


def _look(label: str, place: int) -> Look:
    """The look at `place`: neighbours differ in colour, marker and dash; no two of `PLACES` share marker and dash."""
    markers = MARKERS if place < PLACES // 2 else SPARE_MARKERS
    return Look(label, COLORS[place % len(COLORS)], markers[place % len(markers)], DASHES[place % len(DASHES)])


_LABELS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "head": "head only",
    "sparse": "Sparse LoRA",
    "hira": "HiRA",
    "qlora": "QLoRA",
    "skip": "SkipLoRA",
    "slora": "SLoRA",
    "flora": "FLoRA",
    "random": "random batches",
    "sparse_ranks": "Sparse LoRA (ranks)",
    "sparse_l1": "Sparse LoRA (L1)",
    "skip_adapter": "SkipLoRA (per adapter)",
    "dora": "DoRA (PEFT)",
    "baseline": "LoRA, equal steps",
    "full_length": "LoRA, full length",
    "same_flops": "LoRA, equal FLOPs",
    "loss_floor": "loss floor",
    "gradient_norm": "gradient norm",
    "novelty_loss": "novelty + loss floor",
    "least_novel": "least novel",
    "random50": "random batches (50 %)",
    "slora50": "SLoRA (50 %)",
    "random_tokens": "random tokens",
    "random20": "random tokens (20 %)",
    "flora20": "FLoRA (20 %)",
    "flora40": "FLoRA (40 %)",
    "pps20": "FLoRA, PPS (20 %)",
    "random20_gather": "random tokens (20 %), gather",
    "flora20_gather": "FLoRA (20 %), gather",
    "flora40_gather": "FLoRA (40 %), gather",
    "pps20_gather": "FLoRA, PPS (20 %), gather",
    "targets_only": "all targets, gather",
    "flora_fractional": "FLoRA, fractional",
}
_FIRST = ("full", "lora", "baseline", "full_length", "same_flops", "head", "sparse", "hira", "qlora", "skip", "random")
METHODS: dict[str, Look] = {name: _look(label, place) for place, (name, label) in enumerate(_LABELS.items())}
METHODS = {name: METHODS[name] for name in dict.fromkeys((*_FIRST, *METHODS))}  # in tables: what is compared with first


def order(methods: Iterable[str]) -> list[str]:
    """Distinct methods, known ones first in the registry's order, then by name."""
    known = list(METHODS)
    return sorted(set(methods), key=lambda name: (known.index(name) if name in METHODS else len(known), name))


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """A distinct look for each method.

    A name outside the registry takes the place its hash points to, or the next whose marker and dash are free, and
    whose colour is, while there is one.
    """
    chosen: dict[str, Look] = {}
    for name in order(methods):
        chosen[name] = METHODS[name] if name in METHODS else _free_look(name, chosen)
    return chosen


def _free_look(name: str, chosen: dict[str, Look]) -> Look:
    taken = {(look.marker, look.dash) for look in (*METHODS.values(), *chosen.values())}
    start = zlib.crc32(name.encode()) % PLACES
    candidates = [_look(name, (start + shift) % PLACES) for shift in range(PLACES)]
    free = [look for look in candidates if (look.marker, look.dash) not in taken] or candidates
    colors = {look.color for look in chosen.values()}
    return next((look for look in free if look.color not in colors), free[0])


def wrapped(text: str, width: int) -> str:
    """`text` in lines of at most `width` characters, so that no name runs out of the figure."""
    return "\n".join(textwrap.wrap(text, width)) or text


def figure(height: float) -> Figure:
    """An empty figure, `WIDTH` x `height` inches, outside pyplot's global state, that a notebook shows as one PNG.

    IPython draws a bare Figure only once pyplot's inline backend is active; `_repr_png_` makes it independent of that.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    new = Figure(figsize=(WIDTH, height), dpi=SCREEN_DPI, layout="constrained")
    FigureCanvasAgg(new)
    new._repr_png_ = partial(_png, new)  # type: ignore[attr-defined]
    return new


def legend(drawn: Figure, handles: list[Any], labels: list[str], title: str | None = None, at: str = "lower") -> None:
    """A legend outside the axes, above or below, in columns as its longest label allows; the figure grows by it."""
    labels = [wrapped(label, 70) for label in labels]
    longest = max((len(line) for label in labels for line in label.split("\n")), default=1)
    columns = max(1, min(len(labels), 122 // (longest + 13)))
    lines = sum(label.count("\n") + 1 for label in labels) / columns + (title is not None)
    drawn.set_figheight(drawn.get_figheight() + 0.17 * math.ceil(lines))
    drawn.legend(handles, labels, loc=f"outside {at} center", ncols=columns, title=title)


def rows_height(methods: Iterable[str]) -> float:
    """Inches that a row per method takes, when each is as high as the longest name needs."""
    names = [look.label for look in looks(methods).values()]
    lines = max(wrapped(name, 28).count("\n") + 1 for name in names)
    return len(names) * max(0.34, 0.15 * lines + 0.1)


def list_methods(ax: Axes, methods: list[str]) -> None:
    """Methods down the y axis, the first on top, long names in several lines."""
    names = [wrapped(look.label, 28) for look in looks(methods).values()]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def spaced(x: Sequence[float]) -> list[int]:
    """Points that carry a marker: none so near to the one before that the two would blot."""
    marks: list[int] = []
    for place in range(len(x)):
        if not marks or x[place] - x[marks[-1]] >= 0.06 * (x[-1] - x[0]):
            marks.append(place)
    return marks


def shades(count: int) -> list[Any]:
    """Dark to light: told apart by lightness alone, in grey print and by every kind of colour vision."""
    import matplotlib

    steps = max(1, count - 1)
    return [matplotlib.colormaps["cividis"](0.05 + 0.9 * place / steps) for place in range(count)]


def context() -> Any:
    """Apply the style for the duration of a `with` block, leaving the reader's own settings as they are."""
    import matplotlib

    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **RC})


def _png(drawn: Figure) -> bytes:
    buffer = io.BytesIO()
    with context():
        drawn.savefig(buffer, format="png")
    return buffer.getvalue()


def save(drawn: Figure, path: str | Path) -> Path:
    """Write a figure for print, whole or not at all; the format follows the file's ending.

    Raises:
        ParameterError: the ending is none that can be drawn.
    """
    path = Path(path)
    known = drawn.canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise ParameterError("figure", str(path), f"must end in one of {', '.join(sorted(known))}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        with context():
            drawn.savefig(temporary, dpi=PRINT_DPI)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def plain_ticks(axis: Axis, places: Sequence[float]) -> None:
    """Ticks of a logarithmic axis at `places` and nowhere else, written out."""
    from matplotlib.ticker import NullLocator

    axis.set_ticks(places, [f"{place:g}" for place in places])
    axis.set_minor_locator(NullLocator())
