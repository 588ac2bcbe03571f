"""How all plots look: sizes, colours, hatches, axes; and the way from a figure to its PNG."""

import io
import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
)
INK, MUTED, RULE, PALE = "#1f2328", "#57606a", "#d8dee4", "#e9edf0"
MODEL_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, INK, SKY)
CONTROL_COLOURS = ("#6e7781", "#9aa2ab")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
CONTROL_MARKERS = ("x", "+", "1", "2")
LINE_STYLES = ("-", "--", "-.", ":")

WIDE_INCHES, NARROW_INCHES = 8.0, 3.8
WIDE_DPI, NARROW_DPI = 160, 190

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlepad": 6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def png(draw: Callable[..., Figure]) -> Callable[..., bytes]:
    """Turn a function that draws a figure into one that returns its PNG, whatever the user's own settings."""

    @wraps(draw)
    def drawn(*args: Any, narrow: bool = False, **kwargs: Any) -> bytes:
        defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
        with matplotlib.rc_context({**defaults, **_STYLE}):
            canvas = draw(*args, narrow=narrow, **kwargs).canvas
            assert isinstance(canvas, FigureCanvasAgg)
            canvas.draw()
            image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
        # 256 colours: a third of the bytes, and no eye sees it.
        colours = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        buffer = io.BytesIO()
        colours.save(buffer, "png", compress_level=6)
        return buffer.getvalue()

    drawn.__annotations__["return"] = bytes
    return drawn


def new_figure(height: float, narrow: bool) -> Figure:
    """A figure as wide as the page, so many inches high, that lays itself out when it is drawn."""
    width, dpi = (NARROW_INCHES, NARROW_DPI) if narrow else (WIDE_INCHES, WIDE_DPI)
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def lay_out(figure: Figure) -> None:
    """Lay a figure out for good, so that places within it can be measured."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")


def grid(figure: Figure, count: int, columns: int) -> list[Axes]:
    """So many axes in rows of `columns`; what is left over in the last row stays blank."""
    columns = min(count, columns)
    axes = list(figure.subplots(math.ceil(count / columns), columns, squeeze=False).flat)
    for blank in axes[count:]:
        blank.remove()
    return axes[:count]


def block_grid(figure: Figure, sizes: Sequence[int], columns: int) -> list[Axes]:
    """Blocks of so many axes in rows of `columns`, each block beginning a row; what is left over stays blank."""
    columns = min(max(sizes), columns)
    rows = [math.ceil(size / columns) for size in sizes]
    axes = figure.subplots(sum(rows), columns, squeeze=False)
    kept: list[Axes] = []
    for at, size in zip(itertools.accumulate(rows, initial=0), sizes, strict=False):
        block = list(axes[at : at + math.ceil(size / columns)].flat)
        kept += block[:size]
        for blank in block[size:]:
            blank.remove()
    return kept


def styled(entries: Sequence[Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Each entry with its line's looks: models through the palette, controls through greys; no two alike."""
    looks, seen = [], {False: 0, True: 0}
    for entry in entries:
        control = bool(getattr(entry, "is_control", False))
        index, seen[control] = seen[control], seen[control] + 1
        colours, markers = (CONTROL_COLOURS, CONTROL_MARKERS) if control else (MODEL_COLOURS, MARKERS)
        looks.append(
            (
                entry,
                {
                    "color": colours[index % len(colours)],
                    "marker": markers[index % len(markers)],
                    "linestyle": LINE_STYLES[(index + control) % len(LINE_STYLES)],
                    "linewidth": 1.2 if control else 1.8,
                    "markersize": 4.5,
                },
            )
        )
    return looks


def scale_for(axes: Axes, values: Sequence[float], factor: float) -> bool:
    """Make a y axis logarithmic where values span more than `factor`, else start it at 0; whether it is logarithmic."""
    if values and min(values) > 0 and max(values) > factor * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return True
    axes.set_ylim(bottom=min([0.0, *values]))
    return False


def wrapped(label: str, narrow: bool) -> str:
    """A label in lines short enough for the margin of a chart."""
    return textwrap.fill(label, 18 if narrow else 28, break_long_words=True, max_lines=3, placeholder=" …")


def cut(text: str, length: int) -> str:
    """A text for where there is one line: what is too long ends in an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def layer_ticks(num_layers: int, narrow: bool) -> list[int]:
    """Layers to name on an axis, without crowding it."""
    room = 13 if narrow else 26
    return list(range(0, num_layers, next(step for step in (1, 2, 5, 10, 20, 50, 100) if num_layers <= room * step)))
