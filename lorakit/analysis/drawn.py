"""What a picture says in words, for who does not see it, and in numbers, for a test that does not look at pictures."""

import math
import re
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

GOLDEN = (5**0.5 - 1) / 2  # the fractions of its multiples are all different, and spread evenly


class Drawn(Figure):
    """A figure whose text says what is drawn, panel by panel: see `drawn_numbers`.

    A notebook shows it as one PNG with `alt_text`, and under it what the figure shows, where a `caption` says so.
    """

    caption = ""

    def __repr__(self) -> str:
        panels = ", ".join(f"{count} numbers: {total:.4g}" for count, total in map(drawn_numbers, self.axes))
        return f"{super().__repr__()[:-1]}: {panels}>"

    def _ipython_display_(self) -> None:
        from IPython.display import display

        picture = {"image/png": self._repr_png_(), "text/plain": repr(self)}
        display(picture, metadata={"image/png": {"alt": alt_text(self)}}, raw=True)
        if self.caption:
            display({"text/markdown": f"*{self.caption}*", "text/plain": self.caption}, raw=True)


def alt_text(drawn: Figure) -> str:
    """Title, axes and names of what is drawn, panel by panel; numbers stand in the tables beside a figure."""
    legends = [*drawn.legends, *(ax.get_legend() for ax in drawn.axes if ax.get_legend())]
    named = [text.get_text() for legend in legends for text in (*legend.get_texts(), legend.get_title())]
    panels = []
    for ax in drawn.axes:
        listed = [text.get_text() for text in ax.get_yticklabels() if re.search("[A-Za-z]{2}", text.get_text())]
        axes = " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
        panels += [ax.get_title("left"), axes, ", ".join(listed)]
    said = [drawn.get_suptitle(), *panels, drawn.get_supylabel(), drawn.get_supxlabel(), ", ".join(filter(None, named))]
    return ". ".join(dict.fromkeys(" ".join(text.split()).rstrip(".") for text in said if text.strip()))


def drawn_numbers(ax: Axes) -> tuple[int, float]:
    """How many numbers a panel shows, and a digest of them: where lines, dots, bars and cells are, what texts say.

    Each artist's numbers, divided by the largest of them, are summed with weights between 1 and 2 that differ from
    place to place, and ten times the largest one's decimal logarithm is added. So the sum moves, in its first decimal,
    when one number moves by a tenth of the largest, when two change places, or when the unit changes, and hardly by
    another processor's last bits. What cannot be drawn (NaN, infinities, masked cells) counts as 0.
    """
    count, total = 0, 0.0
    for artist in _numbers(ax):
        numbers = np.ma.filled(np.ma.masked_invalid(np.ma.asarray(artist, float)), 0).ravel()
        count += numbers.size
        if largest := np.abs(numbers).max(initial=0):
            weights = 1 + np.arange(1, numbers.size + 1) * GOLDEN % 1
            total += 10 * math.log10(largest) + float(weights @ numbers) / largest
    return count, total


def _numbers(ax: Axes) -> Iterator[ArrayLike]:
    for line in ax.lines:
        yield from (line.get_xdata(orig=False), line.get_ydata(orig=False))
    for collection in ax.collections:
        places = collection.get_offsets()
        yield from (places[:, 0], places[:, 1])
        if len(places) == 1:  # no dots, which are one marker in many places, but lines and areas
            yield from (numbers for path in collection.get_paths() for numbers in path.vertices.T)
    for patch in ax.patches:
        yield from patch.get_path().transformed(patch.get_patch_transform()).vertices.T
    for artist in (*ax.collections, *ax.images):
        yield from () if artist.get_array() is None else (artist.get_array(),)
    said = " ".join((ax.get_title("left"), ax.get_xlabel(), ax.get_ylabel(), *(text.get_text() for text in ax.texts)))
    yield [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", said.replace("−", "-"))]
