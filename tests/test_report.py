"""The report: notebooks are executed, a failure never looks like a page, and pages fetch nothing."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from nbformat import v4

from silalib.analysis import plots
from silalib.errors import Stopped, UserError
from silalib.experiments import EXHIBITS, Exhibit
from silalib.files import ROOT
from silalib.report import build, notebooks, pages

PARAMETERS = 'profile = "quick"\nseeds = None\ndevice = "auto"\nworkers = None\ntrain = True'


def encoded(kind):
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (900, 500), "#0072b2").save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def picture(**metadata):
    data = {"image/png": encoded("png"), "text/plain": "<IPython.core.display.Image object>"}
    return v4.new_output("display_data", data, metadata={"image/png": metadata})


def shown(**data):
    return v4.new_output("display_data", {name.replace("_", "/"): content for name, content in data.items()})


def code(source, *outputs, tags=(), count=1):
    return v4.new_code_cell(source, outputs=list(outputs), execution_count=count, metadata={"tags": list(tags)})


def notebook(*cells):
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [v4.new_markdown_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


@pytest.fixture
def exhibits(tiny, plan):
    """One exhibit; the pages without runs of their own are there too. No other has runs, so the index judges none."""
    plan([])
    grid = lambda profile, seeds=None: [
        tiny(noise_images=20, noise_sigmas=2, noise_draws=2, hessian_images=10),
        tiny(seed=7),
    ]
    return {"tiny": Exhibit("A tiny table", grid, "01_tiny")}


@pytest.fixture
def page(exhibits, results):
    """page(*cells) -> the page of an executed notebook of these."""

    def render(*cells, stem="00_siamese_labels", profile="quick"):
        return pages.Report(profile, exhibits=exhibits).notebook_page(stem, notebook(*cells))

    return render


def write(folder, stem, *cells):
    import nbformat

    nbformat.write(
        notebook(v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), *cells), folder / f"{stem}.ipynb"
    )


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


def test_notebooks_are_the_exhibits_in_the_papers_order():
    found = notebooks.contents(EXHIBITS)
    assert list(found) == sorted(found) == sorted(path.stem for path in notebooks.FOLDER.glob("*.ipynb"))
    for name, exhibit in EXHIBITS.items():
        assert not exhibit.notebook or name in found[exhibit.notebook][1]


def test_build_executes_and_every_failure_is_told(tmp_path, exhibits, results, capsys):
    """A page that is made, a notebook that ends early, and one that an error ends."""
    folder = results / "quick" / "report"
    folder.mkdir(parents=True)
    (folder / "09_claims.html").write_text("an old page")
    shows = "import os, sys, silalib\nprint(silalib.__file__, os.getcwd(), profile, seeds, train)\n"
    shows += "print('noi' + 'se', file=sys.stderr)"
    write(tmp_path, "00_siamese_labels", "# The method", v4.new_code_cell(shows))
    write(tmp_path, "09_claims", v4.new_code_cell("import sys\nsys.exit(0)"), v4.new_code_cell("print('finished')"))
    write(tmp_path, "01_tiny", v4.new_code_cell("raise ValueError('of <this>\\nand that')"))
    assert build.build("quick", None, [3, 4], train=False, folder=tmp_path, exhibits=exhibits) == 1
    done, error, failed = [path.read_text() for path in sorted(folder.glob("0*.html"))]
    assert f"{ROOT / 'silalib' / '__init__.py'} {ROOT} quick [3, 4] False" in done
    assert "noise" not in done
    assert "could not be built" in failed and "ended the notebook early (SystemExit: 0)" in failed
    assert "an old page" not in failed and "finished" not in failed
    assert "ValueError: of &lt;this&gt;</pre>" in error and "Traceback</summary>" in error and "\x1b" not in error
    executed = results / "quick" / "notebooks"
    assert [path.name for path in executed.iterdir()] == ["00_siamese_labels.ipynb"]
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert "00_siamese_labels: started" in lines and "noise" in lines
    assert any(re.fullmatch(r"00_siamese_labels: ended after \d+ s", line) for line in lines)
    assert lines[lines.index("01_tiny: failed") + 1] == "  ValueError: of <this>"
    assert not [path for path in results.rglob("*") if path.suffix == ".tmp"]


def test_failures_before_the_kernel_are_one_line(tmp_path, exhibits, results, capsys):
    write(tmp_path, "00_siamese_labels")
    text = (tmp_path / "00_siamese_labels.ipynb").read_text().replace("workers = None", "pass")
    (tmp_path / "00_siamese_labels.ipynb").write_text(text)
    stems = ["00_siamese_labels", "01_tiny"]
    assert build.build("quick", stems, folder=tmp_path, exhibits=exhibits) == 1
    errors = capsys.readouterr().err
    assert "  00_siamese_labels.ipynb does not set workers in a cell tagged 'parameters'\n" in errors
    assert "01_tiny.ipynb is missing" in errors
    with pytest.raises(UserError, match="unknown profile"):
        build.build("huge")


def test_an_error_of_the_users_has_no_traceback(exhibits):
    content = pages.Report("quick", exhibits=exhibits).page("01_tiny", "failed", error="no data", traceback=["no data"])
    assert "no data" in content and "Traceback" not in content


def test_cells_that_were_not_executed_are_a_failure():
    notebooks.check_complete(notebook("text", code("1"), code(" \n", count=None)))
    with pytest.raises(UserError, match="1 of 2 code cells were not executed"):
        notebooks.check_complete(notebook(code("1"), code("2", count=None)))


def test_math_becomes_mathml(page):
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
    assert ">log</mo>" in content and "<mtable" in content
    text = re.sub(r"<(style|code).*?</\1>|<[^>]*>", "", content, flags=re.DOTALL)
    assert "$" not in text and "\\" not in text and "&amp;" not in text
    assert 'class="unbroken"><math' in content  # x^2 and its full stop


@pytest.mark.parametrize("formula", [r"\nosuch{x}", "a & b", r"\begin{foo}x &= y\end{foo}"])
def test_unknown_math_fails_with_its_formula(formula, page):
    with pytest.raises(UserError) as error:
        page(f"# Title\n\n${formula}$")
    assert str(error.value).startswith("cannot show the formula") and formula in str(error.value)


ENVIRONMENTS = {"aligned", "split", "cases", "array", "matrix", "pmatrix", "bmatrix", "vmatrix", "substack"}
"""latex2mathml leaves out others without a word."""


def test_every_formula_of_the_notebooks_is_understood():
    """Also where latex2mathml would guess: at a brace that is left open, at an environment that it does not know."""
    import nbformat

    found = 0
    for path in sorted(notebooks.FOLDER.glob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            text = cell.source if cell.cell_type == "markdown" else ""
            text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
            for formula in re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", text, re.DOTALL):
                result = pages.mathml(formula.strip("$"))
                plain = formula.replace(r"\{", "").replace(r"\}", "")
                assert plain.count("{") == plain.count("}") and "merror" not in result, formula
                assert set(re.findall(r"\\begin\{(\w+)", formula)) <= ENVIRONMENTS, formula
                found += 1
    assert found > 50


def test_page_fetches_nothing_and_is_accessible(record, page):
    frame = "<table><caption>Accuracy &amp; more</caption><tr><td>76.1 ± 0.3</td></tr></table>"
    content = page(
        "## Starts at two\n\n[next](09_claims.ipynb#part), [arXiv](https://arxiv.org/abs/2103.00200)",
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
    assert levels == [1, 2, 2, 2, 2]  # the last is that of the records
    identifiers = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    links = [link["href"] for link in elements.all("a")]
    assert {link[1:] for link in links if link.startswith("#")} <= set(identifiers)
    assert {"00_siamese_labels.html", "index.html", "09_claims.html", "09_claims.html#part"} <= set(links)
    assert "a warning" not in content and "0%|" not in content
    (region,) = [attributes for _, attributes in elements.found if attributes.get("role") == "region"]
    assert region["aria-label"] == "Accuracy & more" and region["tabindex"] == "0"
    assert len(content) < 40_000  # with two small images


def test_page_names_its_records(record, page):
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
def test_page_that_would_fetch_something_fails(source, page):
    with pytest.raises(UserError, match="outside of the page"):
        page(source)


def test_index_lists_every_notebook_with_its_state(record, results, exhibits, page):
    report = pages.Report("quick", exhibits=exhibits)
    folder = results / "quick" / "report"
    folder.mkdir(parents=True)
    thumbnail = picture(alt="x", thumbnail="<svg><title>in a thumbnail</title></svg>")
    (folder / "00_siamese_labels.html").write_text(page("# Method", code("t", thumbnail)), encoding="utf-8")
    (folder / "01_tiny.html").write_text(page("# Tiny", code("p", picture(alt="x")), stem="01_tiny"), encoding="utf-8")
    report.write_index()
    index = (folder / "index.html").read_text(encoding="utf-8")
    cards = re.findall(r"<li>.*?</li>", index, re.DOTALL)
    assert len(cards) == 3
    assert index.index("Does SiLa work?") < index.index("<li>")  # the answer comes first
    assert ">demo on digits<" in cards[0] and ">in a thumbnail<" in cards[0]
    assert "1 of 2 runs not run" in cards[1] and ">not built<" in cards[2]
    (folder / "09_claims.html").write_text(report.page("09_claims", "failed", error="E: <b>"), encoding="utf-8")
    report.write_index()
    index = (folder / "index.html").read_text(encoding="utf-8")
    assert ">failed<" in index and "E: &lt;b&gt;" in index
    (folder.parent / "runs" / record.run.key / "result.json").write_text("{", encoding="utf-8")
    damaged = page("# Tiny", stem="01_tiny")
    assert "2 of 2 runs of this page are missing (1 with a damaged record)" in damaged
    (folder / "01_tiny.html").write_text(damaged, encoding="utf-8")
    report.write_index()
    index = (folder / "index.html").read_text(encoding="utf-8")
    assert "1 of 2 records damaged" in index and "1 of 2 runs not run" in index
    for path in folder.iterdir():
        elements = Elements(path.read_text(encoding="utf-8"))
        assert not elements.open
        for link in elements.all("a"):
            if not link["href"].startswith(("#", "https:")):
                assert (folder / link["href"]).exists()


def images(content):
    """The pictures inside a page, as (kind, PIL.Image)."""
    from PIL import Image

    found = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', content)
    return [(kind, Image.open(io.BytesIO(base64.b64decode(image)))) for kind, image in found]


def shown_by(monkeypatch, function, *arguments, **options):
    """The output of a cell in which `plots.show` or `plots.show_table` is called."""
    from IPython.core.formatters import DisplayFormatter

    items = []
    monkeypatch.setattr("IPython.display.display", items.append)
    function(*arguments, **options)
    data, metadata = DisplayFormatter().format(items.pop())
    return v4.new_output("display_data", data, metadata=metadata)


def test_a_figure_is_the_svg_that_was_saved(results, exhibits, page, monkeypatch):
    """Once, with a window on each panel for a phone, and links to the files; its thumbnail is on the index alone."""
    fig, axes = plots.plt.subplots(1, 2, figsize=(6, 4))
    for ax in axes:
        ax.plot([1, 2])
    fig.suptitle("Two lines")
    arguments = (fig, "waves", "quick", "Waves")
    content = page("# Waves", code("plot", shown_by(monkeypatch, plots.show, *arguments, thumb=0)))
    elements = Elements(content)
    assert not elements.open and not elements.all("img")
    saved = (results / "quick" / "figures" / "waves.svg").read_text()
    assert content.count(saved) == 1
    assert [svg["aria-label"] for svg in elements.all("svg") if "role" in svg] == ["Waves", ""]  # and the thumbnail's
    windows = [use["href"] for use in elements.all("use") if "href" in use]
    assert (
        windows == ["#figure-waves"] * 2 and content.count('id="figure-waves"') == 1 and "<p>Two lines</p>" in content
    )
    links = {link["href"] for link in elements.all("a")}
    assert {"../figures/waves.svg", "../figures/waves.csv"} <= links
    report = pages.Report("quick", exhibits=exhibits)
    report.folder.mkdir()
    (report.folder / "00_siamese_labels.html").write_text(content, encoding="utf-8")
    report.write_index()
    index = (report.folder / "index.html").read_text(encoding="utf-8")
    assert index.count('id="figure-waves-thumbnail"') == 1 and 'id="figure-waves"' not in index


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_pictures_of_every_kind_are_shown(page, kind):
    ((shown_kind, image),) = images(page("# P", code("p", shown(**{f"image/{kind}": encoded(kind)}))))
    assert shown_kind == kind and image.size == (900, 500)


def test_a_drawing_is_shown(page):
    drawing = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><text>ä "b" #</text></svg>'
    content = page("# D", code("SVG('drawing.svg')", shown(**{"image/svg+xml": drawing})))
    assert '<text>ä "b" #</text>' in content and 'aria-label="Figure of' in content


def test_tables_have_headers_for_a_screen_reader(results, page, monkeypatch):
    """Two levels of columns: groups, an empty corner, names of the rows in the first column."""
    import pandas as pd

    columns = pd.MultiIndex.from_tuples([("", "method"), ("top-1", "ours"), ("top-1", "paper")])
    frame = pd.DataFrame([["IND", "76.1", "76.45"], ["SiLa", "", "77.85"], ["", "1.0", ""]], columns=columns)
    content = page("# T", code("t", shown_by(monkeypatch, plots.show_table, frame, "gain", "quick", "Accuracy")))
    elements = Elements(content)
    assert [header["scope"] for header in elements.all("th")] == ["colgroup", "col", "col", "col", "row", "row"]
    assert [header.get("colspan") for header in elements.all("th")][:2] == ["2", None]
    rows = re.findall(r'<th [^>]*scope="row">(.*?)</th>', content)
    assert rows == ["IND", "SiLa"] and '<td class="data col2" >77.85</td>' in content
    assert re.findall(r"#T_gain \.(\w+) {\s*text-align: left;", content) == ["col0"]
    again = page("# T", code("t", shown_by(monkeypatch, plots.show_table, frame, "gain", "quick", "Accuracy")))
    assert content == again


def test_a_signal_leaves_pages_as_they_were(tmp_path, results, exhibits):
    """The notebook interrupts the process that executes it."""
    report = pages.Report("quick", exhibits=exhibits)
    report.folder.mkdir(parents=True)
    old = report.page("00_siamese_labels", "failed", error="an old page")
    (report.folder / "00_siamese_labels.html").write_text(old, encoding="utf-8")
    source = "import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)"
    write(tmp_path, "00_siamese_labels", v4.new_code_cell(source))
    stems = ["00_siamese_labels", "09_claims"]
    write(tmp_path, "09_claims", v4.new_code_cell("import time\ntime.sleep(60)"))
    with pytest.raises(Stopped, match="stopped with 2 of 2 pages left"):
        build.build("quick", stems, folder=tmp_path, exhibits=exhibits)
    assert (report.folder / "00_siamese_labels.html").read_text(encoding="utf-8") == old
    assert "not built" in (report.folder / "index.html").read_text(encoding="utf-8")
