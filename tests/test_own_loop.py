"""docs/own_loop.md: its blocks run from top to bottom and print what it says."""

import contextlib
import io
import re

import pytest

from silalib.files import ROOT

PAGE = (ROOT / "docs" / "own_loop.md").read_text()
TRIED_BY_HAND = "## With other libraries"


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


def read_and_do(page):
    """Run the blocks as a reader would, one after the other; returns how many of them are followed by their output."""
    names, shown = {}, re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", page, re.DOTALL)
    for code, expected in shown:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        printed = printed.getvalue()
        assert re.sub(r"\d", "0", printed) == re.sub(r"\d", "0", expected)
        assert numbers(printed) == pytest.approx(numbers(expected), rel=0.02, abs=0.002)
    return sum(bool(expected) for _, expected in shown)


def test_what_the_page_prints():
    eager = PAGE.split(TRIED_BY_HAND)[0].replace("torch.compile(siamese_labels)", "siamese_labels")
    assert read_and_do(eager) == 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of torch's own while it compiles
def test_the_plain_loop_compiled():
    first = re.search(r"```python\n.*?```", PAGE, re.DOTALL)[0]
    recipe = re.search(r"## A plain loop.*?(?=\n## )", PAGE, re.DOTALL)[0]
    assert "torch.compile(" in recipe and read_and_do(f"{first}\n{recipe}") == 0
