"""The report: notebooks are executed, a failure never looks like a page, and pages fetch nothing."""

import base64
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from nbformat import v4

from silalib import report
from silalib.errors import UserError
from silalib.experiments import EXHIBITS, Exhibit

PARAMETERS = 'profile = "quick"\nseeds = None\ndevice = "auto"\nworkers = None\ntrain = True'
STEMS = ("00_method", "01_tiny", "02_other")


def png():
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (900, 500), "#0072b2").save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def picture(**metadata):
    data = {"image/png": png(), "text/plain": "<IPython.core.display.Image object>"}
    return v4.new_output("display_data", data, metadata={"image/png": metadata})


def shown(**data):
    return v4.new_output("display_data", {name.replace("_", "/"): content for name, content in data.items()})


def code(source, *outputs, tags=(), count=1):
    return v4.new_code_cell(source, outputs=list(outputs), execution_count=count, metadata={"tags": list(tags)})


def notebook(*cells):
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [v4.new_markdown_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


@pytest.fixture(autouse=True)
def small_project(tmp_path, monkeypatch, tiny):
    """A project of three notebooks and one exhibit; returns its folder of notebooks."""
    grid = lambda profile, seeds=None: [
        tiny(noise_images=20, noise_sigmas=2, noise_draws=2, hessian_images=10),
        tiny(seed=7),
    ]
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(report, "FOLDER", folder)
    monkeypatch.setattr(report, "EXHIBITS", {"tiny": Exhibit("A tiny table", grid, "01_tiny")})
    titles = [("The method", ()), ("A tiny table", ("tiny",)), ("Another figure", ())]
    monkeypatch.setattr(report, "NOTEBOOKS", dict(zip(STEMS, titles)))
    return folder


def write(folder, stem, *cells):
    import nbformat

    nbformat.write(
        notebook(v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), *cells), folder / f"{stem}.ipynb"
    )


def page(*cells, stem="00_method", profile="quick"):
    return report.notebook_page(notebook(*cells), stem, profile, None)


class Elements(HTMLParser):
    """The elements of a page as (tag, attributes), and which elements were left open."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, content):
        super().__init__()
        self.found, self.open = [], []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, *tags):
        return [attributes for tag, attributes in self.found if tag in tags]


def test_notebooks_are_the_exhibits_in_the_papers_order(monkeypatch):
    monkeypatch.undo()
    stems = list(report.NOTEBOOKS)
    assert stems == sorted(stems) and stems[0] == "00_siamese_labels"
    assert {exhibit.notebook for exhibit in EXHIBITS.values()} - {None} <= set(stems)


def test_build_executes_and_an_early_exit_is_a_failure(small_project, results, capsys):
    folder = results / "quick" / "report"
    folder.mkdir(parents=True)
    (folder / "02_other.html").write_text("an old page")
    shows = "import os, sys, silalib\nprint(silalib.__file__, os.getcwd(), profile, seeds, train)\n"
    shows += "print('noi' + 'se', file=sys.stderr)"
    write(small_project, "00_method", "# The method", v4.new_code_cell(shows))
    write(small_project, "02_other", v4.new_code_cell("import sys\nsys.exit(0)"), v4.new_code_cell("print('finished')"))
    assert report.build("quick", ["00_method", "02_other"], seeds=(3, 4), train=False) == 1
    done, failed = [(folder / f"{stem}.html").read_text() for stem in ("00_method", "02_other")]
    assert f"{report.ROOT / 'silalib' / '__init__.py'} {report.ROOT} quick [3, 4] False" in done
    assert "noise" not in done
    assert "could not be built" in failed and "ended the notebook early (SystemExit: 0)" in failed
    assert "an old page" not in failed and "finished" not in failed
    executed = results / "quick" / "notebooks"
    assert [path.name for path in executed.iterdir()] == ["00_method.ipynb"]
    output = capsys.readouterr()
    assert output.out == f"{folder / 'index.html'}\n"
    lines = output.err.splitlines()
    assert "00_method: started" in lines and "noise" in lines
    assert any(re.fullmatch(r"00_method: page written after \d+ s", line) for line in lines)
    assert any(re.fullmatch(r"02_other: failed after \d+ s", line) for line in lines)
    assert not [path for path in results.rglob("*") if path.suffix == ".tmp"]


def test_failures_before_the_kernel_are_one_line(small_project, results, capsys):
    write(small_project, "00_method")
    text = (small_project / "00_method.ipynb").read_text().replace("workers = None", "pass")
    (small_project / "00_method.ipynb").write_text(text)
    assert report.build("quick", ["00_method", "tiny"]) == 1
    errors = capsys.readouterr().err
    assert "  00_method.ipynb does not set workers in a cell tagged 'parameters'\n" in errors
    assert "01_tiny.ipynb is missing" in errors
    with pytest.raises(UserError, match="unknown exhibit 'table9': choose from tiny"):
        report.build("quick", ["table9"])
    with pytest.raises(UserError, match="unknown profile"):
        report.build("huge")


def test_error_of_a_cell_is_one_line(small_project, monkeypatch):
    import papermill
    from papermill.exceptions import PapermillExecutionError

    def fail(*arguments, **options):
        raise PapermillExecutionError(2, 2, "ensure(grid)", "UserError", "no data\nmore", ["UserError: no data"])

    write(small_project, "00_method")
    monkeypatch.setattr(papermill, "execute_notebook", fail)
    parameters = dict(profile="quick", seeds=None, device="auto", workers=None, train=True)
    outcome, _ = report.execute("00_method", parameters, {})
    assert isinstance(outcome, UserError) and str(outcome) == "UserError: no data"
    content = report.plain_page("00_method", "quick", "failed", str(outcome), outcome.traceback)
    assert "UserError: no data" in content and "Traceback" not in content
    content = report.plain_page("00_method", "quick", "failed", "ValueError: <x>", ["\x1b[31mValueError", "line 3"])
    assert "ValueError: &lt;x&gt;" in content and "ValueError\nline 3" in content


def test_cells_that_were_not_executed_are_a_failure():
    report.check_complete(notebook("text", code("1"), code(" \n", count=None)))
    with pytest.raises(UserError, match="1 of 2 code cells were not executed"):
        report.check_complete(notebook(code("1"), code("2", count=None)))


def test_math_becomes_mathml():
    content = page(
        "# Math $x$\n\nInline $a_*b_*c$ with *emphasis*, `$HOME` and `a$b$c` as code.\n\n"
        r"$$\begin{aligned} L &= -\log p_y \\ &< \sum_{c=1}^{C} \mathrm{KL}(p_c) \end{aligned}$$"
        "\n\n| method | loss |\n|---|---|\n| IND | $z_c$ |",
        code("", count=None),
        code("Markdown()", shown(text_markdown="It is $x^2$.")),
    )
    elements = Elements(content)
    assert len(elements.all("math")) == 5 and not elements.open
    assert len([m for m in elements.all("math") if m["display"] == "block"]) == 1
    assert "<code>$HOME</code>" in content and "<code>a$b$c</code>" in content and "<em>emphasis</em>" in content
    assert "<mi>KL</mi>" in content and ">log</mo>" in content and "<mtable" in content
    text = re.sub(r"<(style|code).*?</\1>|<[^>]*>", "", content, flags=re.DOTALL)
    assert "$" not in text and "\\" not in text and "&amp;" not in text
    assert 'class="unbroken"><math' in content  # x^2 and its full stop


@pytest.mark.parametrize("formula", [r"\nosuch{x}", r"\begin{foo}x\end{foo}", r"\frac{1}{2", "a & b", r"\frac"])
def test_unknown_math_fails_with_its_notebook_and_formula(formula):
    with pytest.raises(UserError) as error:
        page(f"# Title\n\n${formula}$")
    assert str(error.value).startswith("00_method.ipynb: cannot show the formula") and formula in str(error.value)


def test_page_fetches_nothing_and_is_accessible(record):
    frame = (
        '<style type="text/css">\n</style><table id="T_1"><caption>Accuracy &amp; more</caption>'
        "<thead><tr><th>net</th><th>top-1</th></tr></thead>"
        "<tbody><tr><td>IND</td><td>76.1 ± 0.3</td></tr><tr><td>SiLa</td><td></td></tr></tbody></table>"
    )
    content = page(
        "## Starts at two\n\n[next](02_other.ipynb#part), [arXiv](https://arxiv.org/abs/2103.00200)",
        code(PARAMETERS, tags=["parameters"]),
        "#### Skips to four\n\n## Again\n\n## Again",
        code(
            'style = \'url("http://example.org/x.css") <script src="http://x">\'',
            picture(alt='Accuracy "by" epoch', width=500),
        ),
        code("table", shown(text_html=frame), v4.new_output("stream", name="stderr", text="a warning")),
        code("bar", shown(**{"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%| |"})),
        code("plt.show()", picture()),
        stem="01_tiny",
    )
    elements = Elements(content)
    assert not elements.open
    for attributes in elements.all("img", "script", "iframe", "source", "object", "embed", "use"):
        assert attributes["src"].startswith("data:")
    assert not elements.all("script", "link", "iframe", "base")
    assert not re.search(r"@import|url\(", "".join(re.findall(r"<style.*?</style>", content, re.DOTALL)))
    assert [image["alt"] for image in elements.all("img")] == ['Accuracy "by" epoch', "Figure of A tiny table"]
    assert dict(elements.found)["html"]["lang"] == "en" and "<title>A tiny table" in content
    levels = [int(tag[1]) for tag, _ in elements.found if re.fullmatch("h[1-6]", tag)]
    assert levels == [1, 2, 2, 2]
    identifiers = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    links = [link["href"] for link in elements.all("a")]
    assert {link[1:] for link in links if link.startswith("#")} <= set(identifiers)
    assert {"00_method.html", "index.html", "02_other.html", "02_other.html#part"} <= set(links)
    assert "a warning" not in content and "0%|" not in content
    assert '<td class="number">76.1 ± 0.3</td>' in content and '<th class="number" scope="col">top-1</th>' in content
    assert 'aria-label="Accuracy &amp; more"' in content
    assert len(content) < 40_000  # with two small images


def test_page_names_its_records(record):
    content = page("# A tiny table", stem="01_tiny")
    origin = record.result["provenance"]
    facts = dict(re.findall(r"<dt>(.*?)</dt> <dd>(.*?)</dd>", content))
    assert facts["profile"] == "quick" and facts["seeds"] == "0 (planned: 0, 7)" and facts["runs"] == "1 of 2"
    assert facts["data"] == "digits (8x8, enlarged), 64 training images"
    assert facts["versions"] == f"PyTorch {origin['torch']}, Python {origin['python']}"
    assert facts["trained"] == origin["finished"][:10] and facts["precision"] == origin["precision"]
    assert "Stand-in data (scikit-learn" in content and "1 of 2 runs of this page are missing" in content
    other = page("# The method", profile="small")
    assert re.findall(r"<dt>(.*?)</dt> <dd>(.*?)</dd>", other) == [("profile", "small")] and "Stand-in" not in other


@pytest.mark.parametrize(
    "source", ['<img src="http://x/y.png">', "![a](figure.png)", "<script>x</script>", "<p style='background: url(x)'>"]
)
def test_page_that_would_fetch_something_fails(source):
    with pytest.raises(UserError, match="outside of the page"):
        page(source)


def test_index_lists_every_notebook_with_its_state(record, results):
    folder = results / "quick" / "report"
    folder.mkdir(parents=True)
    table = "<table><tbody>" + "<tr><td>1</td></tr>" * 20 + "</tbody></table>"
    (folder / "00_method.html").write_text(page("# Method", code("t", shown(text_html=table))), encoding="utf-8")
    (folder / "01_tiny.html").write_text(page("# Tiny", code("p", picture(alt="x")), stem="01_tiny"), encoding="utf-8")
    report.write_index("quick")
    index = (folder / "index.html").read_text(encoding="utf-8")
    cards = re.findall(r"<li>.*?</li>", index, re.DOTALL)
    assert len(cards) == 3
    assert "claims: 8 not run" in index
    assert ">8 not run<" in cards[0] and cards[0].count("<tr>") == 6  # a page without runs of its own: the claims
    assert "1 of 2 runs not run" in cards[1] and "of training" in cards[1] and "of training" not in cards[0]
    assert ">not built<" in cards[2]
    (folder / "02_other.html").write_text(report.plain_page("02_other", "quick", "failed", "E: <b>"), encoding="utf-8")
    report.write_index("quick")
    index = (folder / "index.html").read_text(encoding="utf-8")
    assert ">failed<" in index and "E: &lt;b&gt;" in index
    (folder.parent / "runs" / record.run.key / "result.json").write_text("{", encoding="utf-8")
    damaged = page("# Tiny", stem="01_tiny")
    assert "2 of 2 runs of this page are missing (1 with a damaged record)" in damaged
    (folder / "01_tiny.html").write_text(damaged, encoding="utf-8")
    report.write_index("quick")
    index = (folder / "index.html").read_text(encoding="utf-8")
    assert "1 of 2 records damaged" in index and "1 of 2 runs not run" in index
    for path in folder.iterdir():
        elements = Elements(path.read_text(encoding="utf-8"))
        assert not elements.open
        for link in elements.all("a"):
            if not link["href"].startswith(("#", "https:")):
                assert (folder / link["href"]).exists()


def opened(address):
    from PIL import Image

    kind, content = address.split(",")
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_thumbnail_is_small():
    small = report.thumbnail(f'<img src="{report.compact(png())}">')
    assert opened(small).size == (480, 267) and len(small) < 5000
    assert report.thumbnail("<p>none</p>") is None


def test_pictures_of_a_page_are_small_and_look_the_same():
    """A plot keeps its white and is hardly changed anywhere; of a photograph (random pixels) no pixel changes."""
    import matplotlib.pyplot as plt
    import numpy as np
    from PIL import Image

    fig, ax = plt.subplots(figsize=(6, 4))
    for i in range(8):
        ax.plot(np.sin(np.linspace(0, 9, 100) + i), alpha=0.7)
    plot, photo = io.BytesIO(), io.BytesIO()
    fig.savefig(plot, format="png")
    plt.close(fig)
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo, "png")
    drawn = np.asarray(Image.open(plot).convert("RGB")).astype(int)
    encoded = report.compact(base64.b64encode(plot.getvalue()).decode())
    shown = np.asarray(opened(encoded)).astype(int)
    assert shown.shape == drawn.shape and abs(shown - drawn).mean() < 1
    assert (shown[(drawn == 255).all(-1)] == 255).all()
    assert len(encoded) < len(plot.getvalue()) / 2
    assert np.array_equal(np.asarray(opened(report.compact(base64.b64encode(photo.getvalue()).decode()))), pixels)


def test_tables_have_headers_for_a_screen_reader():
    """Two levels of columns as pandas writes them: groups, an empty corner, names of the rows in the first column."""
    import pandas as pd

    columns = pd.MultiIndex.from_tuples([("", "method"), ("top-1", "ours"), ("top-1", "paper")])
    frame = pd.DataFrame([["IND", "76.1", "76.45"], ["SiLa", "", "77.85"], ["", "1.0", ""]], columns=columns)
    shown_table = frame.style.hide(axis="index").set_caption("Accuracy").to_html()
    content = page("# T", code("t", shown(text_html=shown_table)))
    elements = Elements(content)
    assert [header["scope"] for header in elements.all("th")] == ["colgroup", "col", "col", "col", "row", "row"]
    assert [header.get("colspan") for header in elements.all("th")][:2] == ["2", None]
    assert '<th scope="row">IND</th>' in content and '<td class="number">77.85</td>' in content
    assert content == page("# T", code("t", shown(text_html=shown_table.replace("T_", "T_f"))))


def test_a_signal_leaves_pages_as_they_were(small_project, results, monkeypatch):
    import contextlib

    @contextlib.contextmanager
    def stopped():
        yield SimpleNamespace(is_set=lambda: True)

    folder = results / "quick" / "report"
    folder.mkdir(parents=True)
    old = page("# An old page")
    (folder / "00_method.html").write_text(old, encoding="utf-8")
    monkeypatch.setattr(report.launch, "interruptible", stopped)
    monkeypatch.setattr(report, "run_notebook", lambda *arguments: notebook("# A new page"))
    with pytest.raises(report.Stopped, match="stopped with 1 of 1 pages left"):
        report.build("quick", ["00_method"])
    assert (folder / "00_method.html").read_text(encoding="utf-8") == old
