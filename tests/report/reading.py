"""Read a page and a picture the way a test needs them."""

import io
import re
from html.parser import HTMLParser

from PIL import Image


class Page(HTMLParser):
    """A page's text, tags, pictures, headings, tables and the addresses it would load."""

    def __init__(self, html):
        super().__init__()
        self.words, self.sources, self.images, self.tags, self.captions = [], [], [], [], []
        self.headings, self.tables, self._open = [], [], []
        self.feed(html)
        self.text = plain(" ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "poster")]
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag in ("h2", "h3"):
            self.headings.append("")
        elif tag == "figcaption":
            self.captions.append("")
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.words.append(data)
        if {"h2", "h3"} & set(self._open):
            self.headings[-1] += data
        if "figcaption" in self._open:
            self.captions[-1] += data
        if {"th", "td"} & set(self._open):
            self.tables[-1][-1][-1] += data

    def row(self, heading, name):
        """Cells of the row called `name` in the first table whose header has the column `heading`."""
        for table in self.tables:
            if heading in map(plain, table[0]):
                return next([plain(cell).strip() for cell in row] for row in table if plain(row[0]).strip() == name)
        raise AssertionError(f"no table has a column {heading}")


def plain(text):
    """The text with each run of spaces, whatever their kind, as one, every dash a hyphen and every times sign an x."""
    return re.sub(r"\s+", " ", text).replace("\N{EN DASH}", "-").replace("\N{MULTIPLICATION SIGN}", "x")


def read_png(content):
    """The picture; it is whole, carries no time, and is not blank."""
    image = Image.open(io.BytesIO(content))
    image.load()
    assert image.format == "PNG"
    assert not {"Creation Time", "Software"} & set(image.info)
    dark = sum(image.convert("L").histogram()[:128])
    assert dark > 0.002 * image.width * image.height
    return image
