"""The world's vocabulary: short common words, so that a small tokenizer holds each as one token."""

PEOPLE = (
    "Ann Bob Cara Dan Eve Finn Gina Hugo Ida Jack Kate Leo Mia Nick Olga Paul Rosa Sam Tina Uma Vera Will Yara Zoe"
).split()

OBJECTS = "key cup map pen hat book coin ring lamp drum bell rope kite mask vase comb".split()

COLORS = "red blue green gold pink gray black white brown purple orange silver".split()

THINGS = "cups pens hats books coins rings lamps drums bells kites masks boxes jars bags tins pots".split()

PLACES = "box jar bag tin pot case desk shelf drawer trunk crate chest basket barrel".split()
