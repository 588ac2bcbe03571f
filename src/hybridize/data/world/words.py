"""The world's vocabulary: short common words, so that a small tokenizer holds each as one token."""

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
