"""Labels beside the things they name, without covering one another."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move places apart until neighbours are at least `gap` from each other, each as little as possible.

    Places that crowd each other become a block, centred on their mean.

    Args:
        places: along one axis, in any order.
        gap: in the same unit.

    Returns:
        The new places, in the order given.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    blocks: list[tuple[float, list[int]]] = []
    for index in order:
        blocks.append((places[index], [index]))
        while len(blocks) > 1:
            (low, below), (high, above) = blocks[-2:]
            if high - low >= gap * (len(below) + len(above)) / 2:
                break
            centre = (low * len(below) + high * len(above)) / (len(below) + len(above))
            blocks[-2:] = [(centre, below + above)]
    moved = [0.0] * len(places)
    for centre, block in blocks:
        for rank, index in enumerate(block):
            moved[index] = centre + gap * (rank - (len(block) - 1) / 2)
    return moved


Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in display coordinates."""

_DIRECTIONS = ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, -2), (-1, -2), (1, 2), (-1, 2))
_DISTANCES = (7, 14, 22, 34, 50, 70)
_LINE_FROM = 16
_LINE_BEYOND = 24
_PER_POINT = 8.0
_NEAR = 14
_MISLEADING = 150.0


def place_labels(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    obstacles: Sequence[Box],
    lines: Sequence[Box],
    weights: Sequence[str],
    size: float = 8,
    drop: bool = False,
    colours: Sequence[Any] = (),
) -> None:
    """Write a text beside each point where it covers no other text, no obstacle, and stays within the axes.

    The figure's layout must stand. A text that had to go far away gets a line to its point.

    Args:
        axes: where to.
        points: in data coordinates.
        texts: one per point; the first have the first choice.
        obstacles: what must stay visible.
        lines: what is better not covered, but may be.
        weights: font weight per text.
        size: of the letters, points.
        drop: leave out a text that finds no such place, rather than let it cover another or leave the axes.
        colours: of the letters, one per text; by default ink.
    """
    to_pixels = axes.figure.dpi / 72
    inside = [axes.get_window_extent().extents]
    placed: list[Box] = []
    places = [(float(x), float(y)) for x, y in axes.transData.transform(points)]
    colours = colours or [rcParams["text.color"]] * len(points)
    for point, (x, y), text, weight, colour in zip(points, places, texts, weights, colours, strict=True):
        note = axes.annotate(
            text,
            point,
            (0, 0),
            textcoords="offset points",
            ha="left",
            va="bottom",
            fontsize=size,
            fontweight=weight,
            color=colour,
            linespacing=1.15,
            annotation_clip=False,
        )
        note.set_in_layout(False)
        note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        extent = note.get_window_extent().size

        def fits(box: Box, extent: Any = extent) -> bool:
            return not overlap(box, placed) and extent[0] * extent[1] - overlap(box, inside) < 1

        def cost(candidate: tuple[int, tuple[int, int]], x: float = x, y: float = y, extent: Any = extent) -> float:
            distance, direction = candidate
            box = _box(x, y, extent, distance * to_pixels, direction)
            covered = 3 * overlap(box, placed) + overlap(box, obstacles) + 0.2 * overlap(box, lines)
            covered += 2 * (extent[0] * extent[1] - overlap(box, inside))
            if drop and not fits(box):
                return math.inf
            own = _gap(box, x, y)
            nearer = sum(_gap(box, *other) < min(own, _NEAR * to_pixels) for other in places if other != (x, y))
            covered += _MISLEADING * to_pixels**2 * nearer
            return covered + _PER_POINT * to_pixels * distance + _DIRECTIONS.index(direction)

        distance, direction = min(itertools.product(_DISTANCES, _DIRECTIONS), key=cost)
        box = _box(x, y, extent, distance * to_pixels, direction)
        if drop and not fits(box):
            note.remove()
            continue
        placed.append(box)
        note.set_position(((box[0] - x) / to_pixels, (box[1] - y) / to_pixels))
        note.set_multialignment({1: "left", -1: "right", 0: "center"}[_sign(direction[0])])
        if distance > _LINE_FROM or _gap(box, x, y) > _LINE_BEYOND * to_pixels:
            near = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
            (x1, y1), (x2, y2) = axes.transData.inverted().transform([(x, y), near])
            axes.plot([x1, x2], [y1, y2], color="#8c959f", linewidth=0.7, zorder=1.5)


def _box(x: float, y: float, extent: tuple[float, float], distance: float, direction: tuple[int, int]) -> Box:
    """Where a text so wide and high stands when it is moved away from a point."""
    right, up = direction
    left = x + distance * right - extent[0] * (0.5 - 0.5 * _sign(right))
    bottom = y + distance * up - extent[1] * (0.5 - 0.5 * _sign(up))
    return left, bottom, left + extent[0], bottom + extent[1]


def _gap(box: Box, x: float, y: float) -> float:
    return math.hypot(max(box[0] - x, 0, x - box[2]), max(box[1] - y, 0, y - box[3]))


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def along(points: Sequence[tuple[float, float]], step: float = 6.0) -> list[Box]:
    """Small boxes along a line through points in display coordinates: what labels should not cover."""
    boxes = []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        count = max(1, round(math.hypot(x1 - x0, y1 - y0) / step))
        for index in range(count + 1):
            x, y = x0 + (x1 - x0) * index / count, y0 + (y1 - y0) * index / count
            boxes.append((x - step / 2, y - 2, x + step / 2, y + 2))
    return boxes


def overlap(box: Box, others: Sequence[Box]) -> float:
    """The area of a box that others cover, what two of them cover counted twice."""
    if not len(others):
        return 0.0
    left, bottom, right, top = np.asarray(others).T
    width = np.minimum(box[2], right) - np.maximum(box[0], left)
    height = np.minimum(box[3], top) - np.maximum(box[1], bottom)
    return float((np.maximum(width, 0) * np.maximum(height, 0)).sum())
