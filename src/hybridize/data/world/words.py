"""The world's vocabulary: short common words, so that a small tokenizer holds each as one token."""

import math
from itertools import product
from random import Random

COLORS = [
    "red",
    "blue",
    "green",
    "gold",
    "pink",
    "gray",
    "black",
    "white",
    "brown",
    "purple",
    "orange",
    "silver",
]

THINGS = [
    "cups",
    "pens",
    "hats",
    "books",
    "coins",
    "rings",
    "lamps",
    "drums",
    "bells",
    "kites",
    "masks",
    "boxes",
    "jars",
    "bags",
    "tins",
    "pots",
]

PLACES = [
    "box",
    "jar",
    "bag",
    "tin",
    "pot",
    "case",
    "desk",
    "shelf",
    "drawer",
    "trunk",
    "crate",
    "chest",
    "basket",
    "barrel",
]


def draw_places(rng: Random, number: int) -> list[str]:
    """Distinct places ("red box") that share colours and kinds, so that half of a name does not tell which is meant.

    They are drawn from a grid of few colours by few kinds, about half of it full. At least 1, at most 168 (ValueError).
    """
    side = math.ceil(math.sqrt(1.5 * number))
    num_kinds = min(side, len(PLACES))
    num_colors = min(max(side, math.ceil(number / num_kinds)), len(COLORS))
    colors, kinds = rng.sample(COLORS, num_colors), rng.sample(PLACES, num_kinds)
    return rng.sample([f"{color} {kind}" for color, kind in product(colors, kinds)], number)
