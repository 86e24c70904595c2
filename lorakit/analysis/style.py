"""One look for every figure: the same size, fonts and, for a row, the same colour, marker and dash everywhere."""

import contextlib
import io
import math
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pandas import DataFrame

from lorakit.analysis.drawn import Drawn
from lorakit.analysis.names import LOOKS
from lorakit.errors import require
from lorakit.files import CONFIGS, written

WIDTH = 6.5  # inches: the text width of a page, and 780 pixels in a notebook
SCREEN_DPI, PRINT_DPI = 120, 200
FEW = 12  # points of a line that all carry a marker
Key = tuple[Sequence[Any], Sequence[str]]  # handles and labels of a legend

RC = matplotlib.rc_params_from_file(CONFIGS / "figures.mplstyle", use_default_template=False)


class Look(NamedTuple):
    """How a line is drawn; in grey print `marker` and `dash` (lengths of stroke and gap; "": solid) still name it."""

    color: str
    marker: str
    dash: Any = ""

    @property
    def line(self) -> dict[str, Any]:
        """As matplotlib's options."""
        return {"color": self.color, "marker": self.marker, "ls": (0, self.dash) if self.dash else "-"}


DASHES: tuple[Any, ...] = ("", (5, 1.5), (1.2, 1.2), (6, 1.5, 1.2, 1.5))
# Okabe & Ito's colours for all kinds of colour vision but yellow, the light ones darkened to 3:1 on white.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#209CE2", "#C58800", "#882255", "#777777")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SPARE_MARKERS = ("<", ">", "p", "*", "h", "d", "8")  # of rows the palette does not know

PALETTE = {row: Look(color, marker, DASHES[int(dash)]) for row, (color, marker, dash) in LOOKS.items()}


def looks(rows: Iterable[str]) -> dict[str, Look]:
    """A distinct look for each row, in the order given.

    A row outside the palette takes the place its name's hash points to, or the next whose marker and dash no other
    row of this figure has, and whose colour none has while there is one. It never changes the look of a known row.
    """
    rows = list(dict.fromkeys(rows))
    chosen = {row: PALETTE[row] for row in rows if row in PALETTE}
    every = series(len(SPARE_MARKERS) * len(DASHES), 0, SPARE_MARKERS)
    for row in sorted(set(rows) - chosen.keys()):
        pairs, colors = {look[1:] for look in chosen.values()}, {look.color for look in chosen.values()}
        place = zlib.crc32(row.encode()) % len(every)
        chosen[row] = min(every[place:] + every[:place], key=lambda look: (look[1:] in pairs, look.color in colors))
    return {row: chosen[row] for row in rows}


def series(count: int, first: int = 1, markers: Sequence[str] = MARKERS) -> list[Look]:
    """Looks of lines that are no rows, by their place."""
    places = range(first, first + count)
    return [Look(COLORS[n % len(COLORS)], markers[n % len(markers)], DASHES[n % len(DASHES)]) for n in places]


def wrapped(text: str, width: int) -> str:
    """`text` in lines of at most `width` characters, so that no name runs out of the figure."""
    return "\n".join(textwrap.wrap(text, width)) or text


# drawing ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def panel(height: float, columns: int = 1, rows: int = 1, **grid: Any) -> Iterator[Any]:
    """Within it holds the style: the axes of an empty `figure`, as `subplots` gives them with the options `grid`."""
    with context():
        yield figure(height).subplots(rows, columns, **grid)


def figure(height: float) -> Figure:
    """An empty figure, `WIDTH` x `height` inches, outside pyplot's global state, that a notebook shows as one PNG.

    Its text says what was drawn (`drawn_numbers`), which nbval compares where it does not look at pictures.
    """
    new = Drawn(figsize=(WIDTH, height), dpi=SCREEN_DPI, layout="constrained")
    FigureCanvasAgg(new)
    new._repr_png_ = partial(_drawn, new, "png", SCREEN_DPI)  # type: ignore[attr-defined]
    return new


def captioned(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Of a function that draws: the first paragraph of its docstring stands under its figures in a notebook."""

    @wraps(draw)
    def drawing(*given: Any, **named: Any) -> Figure:
        drawn = draw(*given, **named)
        drawn.caption = " ".join((draw.__doc__ or "").partition("\n\n")[0].split())
        return drawn

    return drawing


def lines(ax: Axes, table: DataFrame, looks: Mapping[str, Look] | None = None, labels: Mapping[str, str] = {}) -> None:
    """A line per column of `table` against its index, between the numbers it has; its markers do not blot.

    Args:
        looks: column -> its look; None: by place. A column without numbers, or missing, is named in the legend, last.
        labels: column -> its name in the legend, where it is another.
    """
    import seaborn as sns

    looks, start = looks or dict(zip(table, series(table.shape[1]), strict=True)), len(ax.lines)
    long = table.rename_axis("x").reset_index().melt("x", var_name="column", value_name="y").dropna()
    there = [name for name in looks if name in {*long["column"]}]
    if there:
        colors, markers, dashes = ({name: looks[name][part] for name in there} for part in range(3))
        sns.lineplot(long, x="x", y="y", hue="column", style="column", hue_order=there, style_order=there, legend=False,
                     palette=colors, markers=markers, dashes=dashes, mec=None, ax=ax, estimator=None)  # fmt: skip
    for name, line in zip(there, ax.lines[start:], strict=True):
        line.set(label=labels.get(name, name), markevery=spaced(line.get_xdata()), markersize=RC["lines.markersize"])
        line.set_markeredgecolor(looks[name].color)
    for name in [name for name in looks if name not in there]:
        ax.plot([], [], label=labels.get(name, name), **looks[name].line)


def points(ax: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """A cloud of points, (N,) each."""
    ax.scatter(x, y, 9, COLORS[1], alpha=0.5, lw=0)


def stacked(ax: Axes, table: DataFrame, texts: Sequence[str], room: float = 0.1, ends: Any = None) -> None:
    """A bar per line of `table`, the first on top, its columns stacked from the left; each of `texts` stands behind it.

    Args:
        room: for the texts, in lengths of the longest bar.
        ends: (N,), where the texts begin; None: at the ends of the bars.
    """
    ends = table.sum(axis=1) if ends is None else ends
    starts = table.cumsum(axis=1).shift(axis=1, fill_value=0)
    for kind, color in zip(table, shades(table.shape[1]), strict=True):
        ax.barh(range(len(table)), table[kind], 0.62, starts[kind], color=color, ec="white", lw=0.8, label=kind)
    for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
        ax.annotate(text, (end, place), (7, 0), textcoords="offset points", va="center", size=8)
    ax.set_xlim(0, (1 + room) * max(ends, default=1))
    list_rows(ax, [*table.index])


def legend(ax: Axes, title: str | None = None, key: Key | None = None, at: str = "lower") -> Figure:
    """A legend outside the axes, above or below, in columns as its longest label allows; the figure grows by it.

    Args:
        key: handles and labels; None: those of what is drawn on `ax`.
    """
    drawn, (handles, labels) = ax.get_figure(), key or ax.get_legend_handles_labels()
    labels = [wrapped(label, 70) for label in labels]
    longest = max((len(line) for label in labels for line in label.split("\n")), default=1)
    columns = max(1, min(len(labels), 122 // (longest + 13)))
    height = sum(label.count("\n") + 1 for label in labels) / columns + (title is not None)
    drawn.set_figheight(drawn.get_figheight() + 0.17 * math.ceil(height))
    drawn.legend(handles, labels, loc=f"outside {at} center", ncols=columns, title=title)
    return drawn


def rows_height(texts: Iterable[str]) -> float:
    """Inches that a line per text takes, when each is as high as the longest needs."""
    counts = [wrapped(text, 28).count("\n") + 1 for text in texts]
    return len(counts) * max(0.34, 0.15 * max(counts) + 0.1)


def list_rows(ax: Axes, texts: Sequence[str]) -> None:
    """Names down the y axis, the first on top, long ones in several lines."""
    ax.set_yticks(range(len(texts)), [wrapped(text, 28) for text in texts])
    ax.set_ylim(len(texts) - 0.4, -0.6)
    ax.set_ylabel("")
    ax.grid(axis="y", visible=False)


def spaced(x: Sequence[float]) -> list[int]:
    """Points that carry a marker: all of a few; of many, none so near to the one before that the two would blot."""
    marks: list[int] = [*range(len(x))] if len(x) <= FEW else []
    for place in range(len(marks), len(x)):
        if not marks or x[place] - x[marks[-1]] >= 0.06 * (x[-1] - x[0]):
            marks.append(place)
    return marks


def shades(count: int) -> list[Any]:
    """Dark to light in equal steps, the lightest 3:1 on white: told apart by lightness alone, so also in grey print."""
    colors = matplotlib.colormaps["plasma"](np.linspace(0, 0.6, 256))
    lightness = colors[:, :3] @ [0.2126, 0.7152, 0.0722]
    steps = np.linspace(lightness[0], lightness[-1], count)
    return [*map(tuple, colors[np.searchsorted(lightness, steps - 1e-9)])]


def mark(ax: Axes, y: float, text: str) -> None:
    """A thin line across at `y`, named beyond its right end."""
    ax.axhline(y, color="0.35", lw=0.8, zorder=1)
    ax.annotate(text, (1, y), (3, 0), ("axes fraction", "data"), textcoords="offset points", va="center", size=8)


def plain_ticks(axis: Axis, places: Sequence[float], factor: float = 1) -> None:
    """Ticks at `places` and nowhere else, written out, `factor` times what they stand for."""
    axis.set_ticks(places, [f"{factor * place:g}" for place in places])
    axis.minorticks_off()


def context() -> Any:
    """Apply the style for the duration of a `with` block, leaving the reader's own settings as they are."""
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **RC})


def _drawn(drawn: Figure, form: str, dpi: float) -> bytes:
    buffer = io.BytesIO()
    with context():
        drawn.savefig(buffer, format=form, dpi=dpi)
    return buffer.getvalue()


def save(drawn: Figure, path: str | Path) -> Path:
    """Write a figure for print, whole or not at all; the format follows the file's ending.

    Raises:
        ParameterError: the ending is none that can be drawn.
    """
    path, known = Path(path).expanduser(), drawn.canvas.get_supported_filetypes()
    require(path.suffix[1:] in known, "figure", str(path), f"must end in one of {', '.join(sorted(known))}")
    with written(path) as temporary:
        temporary.write_bytes(_drawn(drawn, path.suffix[1:], PRINT_DPI))
    return path
