import io

import pytest
from PIL import Image
from reading import Page
from report_example import example

from hybridize.report import plots, render_page
from hybridize.report.figures import draw_plots


@pytest.fixture(scope="session")
def drawn():
    """The example's plots: drawing them takes seconds."""
    return draw_plots(example())


@pytest.fixture(scope="session")
def page(drawn):
    return Page(render_page(example(), drawn))


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without the time that drawing takes: every plot is one grey pixel."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1), 128).save(buffer, "png")
    for name in plots.__all__:
        monkeypatch.setattr(plots, name, lambda *_, **__: buffer.getvalue())
