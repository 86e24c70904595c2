"""What flows where in each method, drawn from `configs/dataflow.json`: boxes, arrows forward and of the gradient."""

import json
import math

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch

from lorakit.analysis import style
from lorakit.errors import require
from lorakit.files import CONFIGS

FLOWS = json.loads((CONFIGS / "dataflow.json").read_text(encoding="utf-8"))
FILLS = {"data": "white", "frozen": "0.88", "trained": "#BFE3F7", "choice": "#F6DFB0", "step": "white"}
KINDS = {"frozen": "frozen, or without a graph", "trained": "trained, or with a graph", "choice": "decides"}
WAYS = {"forward": {"color": "0.25"}, "backward": {"color": style.COLORS[2], "ls": "--"}}


@style.captioned
def dataflow(method: str) -> Figure:
    """Where forward and gradient pass in one method, and what is frozen, trained or decides.

    Args:
        method: "lora", "sparse", "hira", "qlora", "skip", "slora" or "flora".

    Raises:
        ParameterError: there is none of this method.
    """
    require(method in FLOWS, "method", method, f"must be one of {', '.join(FLOWS)}")
    flow, boxes = FLOWS[method], {}
    low, high = (bound(y for _, y, *_ in flow["boxes"].values()) for bound in (min, max))
    with style.panel(0.55 * (high - low) + 1.1) as ax:
        for name, (x, y, kind, text) in flow["boxes"].items():
            wide, tall = 0.08 * max(map(len, text.split("\n"))) + 0.12, 0.42 + 0.36 * text.count("\n")
            look = {"fc": FILLS[kind], "ec": "0.35", "boxstyle": "round,pad=0.06"}
            boxes[name] = ax.add_patch(FancyBboxPatch((x - wide / 2, y - tall / 2), wide, tall, **look))
            ax.text(x, y, text, ha="center", va="center", size=8)
        for way, look in WAYS.items():
            for pair in flow[way]:
                start, end = pair.split(" ")
                ends = [flow["boxes"][name][:2] for name in (start, end)]
                bend = min(0.3, 0.5 / math.dist(*ends)) * (way == "backward")
                arrow = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 1, "shrinkB": 1, **look}
                arrow |= {"patchA": boxes[start], "patchB": boxes[end], "connectionstyle": f"arc3,rad={bend}"}
                ax.add_patch(FancyArrowPatch(*ends, **arrow))
        ax.set(xlim=(-0.7, 6.8), ylim=(low - 0.7, high + 0.7), title=style.wrapped(flow["says"], 95))
        ax.axis("off")
        key = [Patch(fc=FILLS[kind], ec="0.35") for kind in KINDS]
        key += [ax.plot([], [], **look)[0] for look in WAYS.values()]
        return style.legend(ax, key=(key, [*KINDS.values(), "forward", "gradient"]))
