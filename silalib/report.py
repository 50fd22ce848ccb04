"""Execute the notebooks and render them: one HTML page each, and an index, in results/<profile>/report.

Every page is one file that fetches nothing: style, images and math (as MathML) are inside. papermill and nbconvert
take seconds to import, so they are imported where they are used.
"""

import base64
import html
import io
import json
import os
import re
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from pathlib import Path

from . import claims, launch, runs, summary
from .data import dataset
from .errors import Stopped, UserError
from .experiments import EXHIBITS, check_profile, scale
from .paths import ROOT, results_folder
from .progress import duration

NOTEBOOKS = {"00_siamese_labels": ("The method", ("fig3",))}
"""Notebook -> (title, the exhibits whose runs it shows), in the order of the paper."""
for _name, _exhibit in sorted(EXHIBITS.items(), key=lambda item: item[1].notebook or ""):
    if _exhibit.notebook is None:
        continue
    _title, _shown = NOTEBOOKS.get(_exhibit.notebook, (_exhibit.title, ()))
    NOTEBOOKS[_exhibit.notebook] = _title, (*_shown, _name)
NOTEBOOKS["09_claims"] = "Which claims hold?", ()

FOLDER = ROOT / "notebooks"
AT_ONCE = 2
"""Notebooks executed at once, each in a kernel of its own."""


class PageFailed(UserError):
    """A notebook or its page failed; the message is one line, `traceback` how Python tells it."""

    def __init__(self, line, traceback=()):
        super().__init__(line)
        self.traceback = list(traceback)


def build(profile, names=None, seeds=None, device="auto", workers=None, train=True):
    """Execute the notebooks named (exhibits or stems, by default all), render their pages and the index.

    The other arguments are the notebooks' parameters. Returns the exit status: 0, or 1 if a page failed; such a page
    then says so. Raises Stopped after a signal, with the pages that were not finished left as they were.
    """
    check_profile(profile)
    exhibits = {name: exhibit.notebook for name, exhibit in EXHIBITS.items() if exhibit.notebook}
    chosen = {exhibits.get(name, name) for name in names or NOTEBOOKS}
    if unknown := sorted(chosen - set(NOTEBOOKS)):
        raise UserError(f"unknown exhibit {unknown[0]!r}: choose from {', '.join([*exhibits, *NOTEBOOKS])}")
    report, executed = results_folder(profile) / "report", results_folder(profile) / "notebooks"
    try:
        report.mkdir(parents=True, exist_ok=True)
        executed.mkdir(parents=True, exist_ok=True)
    except OSError:
        raise UserError(f"cannot write to {report}: set SILALIB_RESULTS to a folder of yours") from None
    seeds = list(seeds) if seeds else None
    parameters = dict(profile=profile, seeds=seeds, device=device, workers=workers, train=train)
    left, failed = len(chosen), 0
    try:
        for stem, outcome, seconds in execute_all([stem for stem in NOTEBOOKS if stem in chosen], parameters):
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                content = notebook_page(outcome, stem, profile, seeds)
                runs.write_atomically(executed / f"{stem}.ipynb", runs.to_json(outcome))
                say(f"{stem}: page written after {duration(seconds)}")
            except Exception as error:  # whatever it is, the other pages are built
                line = str(error) if isinstance(error, UserError) else first_line(type(error).__name__, error)
                content = plain_page(stem, profile, "failed", line, getattr(error, "traceback", ()))
                (executed / f"{stem}.ipynb").unlink(missing_ok=True)
                say(f"{stem}: failed after {duration(seconds)}\n  {line}")
                failed += 1
            runs.write_atomically(report / f"{stem}.html", content.encode())
            left -= 1
    finally:
        write_index(profile, seeds)
    if left:
        raise Stopped(f"the report stopped with {left} of {len(chosen)} pages left; start again to go on")
    print(report / "index.html", flush=True)
    return 1 if failed else 0


def say(text):
    sys.stderr.write(f"{text}\n")  # in one piece, as several threads speak
    sys.stderr.flush()


# Executing


def execute_all(stems, parameters):
    """Yield (stem, executed notebook or the exception that ended it, seconds) as they finish, AT_ONCE at a time.

    After a signal the kernels are interrupted, which lets training write its checkpoints; ten seconds later those
    still there are killed.
    """
    import papermill  # noqa: F401  once here, before two threads want it

    kernels = {}
    with launch.interruptible() as stopped, ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {pool.submit(execute, stem, parameters, kernels): stem for stem in stems}
        try:
            while futures and not stopped.is_set():
                for future in wait(futures, 0.3, FIRST_COMPLETED).done:
                    if not stopped.is_set():  # else it may have ended because of the signal
                        yield futures.pop(future), *future.result()
        finally:
            for future in futures:
                future.cancel()
            for number in (signal.SIGINT, signal.SIGKILL) if futures else ():
                for process in list(kernels.values()):
                    with suppress(ProcessLookupError):
                        os.kill(process, number)
                wait(futures, 10)


def execute(stem, parameters, kernels):
    """(Executed notebook or exception, seconds) of one notebook; meanwhile kernels[stem] is its kernel's process."""
    began = time.monotonic()
    say(f"{stem}: started")
    try:
        outcome = run_notebook(FOLDER / f"{stem}.ipynb", parameters, kernels)
    except Exception as error:
        outcome = error
    finally:
        kernels.pop(stem, None)
    return outcome, time.monotonic() - began


def first_line(name, message):
    return f"{name}: {message}".strip().splitlines()[0]


def run_notebook(path, parameters, kernels):
    """The executed notebook. Raises UserError for a missing file or parameter, PageFailed where a cell failed."""
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_core.utils import ensure_event_loop
    from papermill.exceptions import PapermillExecutionError

    class Kernel(AsyncKernelManager):
        """This Python, whatever kernels are installed, with this silalib; in the project's folder; without bars."""

        async def start_kernel(self, **options):
            self.kernel_spec.argv[0] = sys.executable
            search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            environment = {**os.environ, "PYTHONPATH": search, "TQDM_DISABLE": "1"}
            await super().start_kernel(**options, cwd=str(ROOT), env=environment)
            kernels[path.stem] = self.provisioner.pid

    if not path.exists():
        raise UserError(f"{path} is missing")
    if unknown := sorted(set(parameters) - set(papermill.inspect_notebook(path))):
        raise UserError(f"{path.name} does not set {', '.join(unknown)} in a cell tagged 'parameters'")
    try:
        notebook = papermill.execute_notebook(
            path,
            None,  # written when it is complete
            parameters,
            kernel_name="python3",
            kernel_manager_class=Kernel,
            extra_arguments=["--log-level=40"],
            shutdown_kernel="immediate",
            coalesce_streams=True,
            progress_bar=False,
            stderr_file=sys.stderr,  # training and warnings are for the terminal, not for the page
        )
    except PapermillExecutionError as error:
        raise PageFailed(first_line(error.ename, error.evalue), error.traceback) from None
    finally:
        ensure_event_loop().close()  # which the kernel's client has made for this thread
    check_complete(notebook)
    return notebook


def check_complete(notebook):
    """Raise PageFailed unless every code cell ran to its end: to papermill, sys.exit(0) in a cell is a success."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    for output in [output for cell in code for output in cell.outputs if output.output_type == "error"]:
        line = first_line(output.ename, output.evalue)
        raise PageFailed(f"a cell ended the notebook early ({line.rstrip(': ')})", output.traceback)
    if left := sum(cell.execution_count is None for cell in code):
        raise PageFailed(f"{left} of {len(code)} code cells were not executed")


# Pages

EXTERNAL = (
    r"""<[^>]*\s(?:src|srcset|poster)=(?!["']?data:)[^>]*>|<(?:script|link|object)"""
    r"""|<style[^<]*(?:@import|url\()|<[^>]*\sstyle=[^>]*url\("""
)
"""What a page must not have: a resource to fetch, or a script."""


def notebook_page(notebook, stem, profile, seeds):
    """The page of an executed notebook. Raises PageFailed for unknown math or something outside of the page."""
    title = NOTEBOOKS[stem][0]
    try:
        body = template("cells").render(cells=notebook.cells, title=title, markdown=markdown_converter(profile))
    except UserError as error:
        raise PageFailed(f"{stem}.ipynb: {error}") from None
    if found := re.search(EXTERNAL, body):
        raise PageFailed(f"{stem}.ipynb shows something from outside of the page: {found[0][:80]}")
    heading, end, rest = re.sub(TABLE, tidy_table, body, flags=re.DOTALL).partition("</h1>")
    if not end:
        heading, rest = f"<h1>{html.escape(title)}", body
    facts, counts = provenance(stem, profile, seeds)
    card = {"state": "done", **counts}
    return page(stem, profile, card, heading=heading + "</h1>", facts=facts, body=rest)


def plain_page(stem, profile, state, error="", traceback=()):
    """The page of a notebook that "failed", or is "not built"."""
    heading = f"<h1>{html.escape(NOTEBOOKS[stem][0])}</h1>"
    details = "\n".join(traceback) if len(traceback) > 1 else ""  # a UserError's is its one line
    return page(stem, profile, {"state": state, "error": error}, heading=heading, traceback=details)


def page(stem, profile, card, **parts):
    """A page with its navigation. What the index says of it, `card`, is kept in its head."""
    links = [(other, title) for other, (title, _) in NOTEBOOKS.items()]
    at = list(NOTEBOOKS).index(stem)
    parts |= {"before": links[max(at - 1, 0) : at], "after": links[at + 1 : at + 2]}
    title, exhibits = NOTEBOOKS[stem]
    return template("page").render(title=title, exhibits=exhibits, profile=profile, card=card, **parts)


def write_index(profile, seeds=None):
    """The index of the pages that are there; one that is not is written as "not built", so that every link leads on."""
    folder = results_folder(profile) / "report"
    cards = []
    for stem, (title, _) in NOTEBOOKS.items():
        path = folder / f"{stem}.html"
        try:
            card, image, content = read_page(path)
        except (OSError, ValueError, TypeError):  # not there, or damaged
            runs.write_atomically(path, plain_page(stem, profile, "not built").encode())
            card, image, content = read_page(path)
        first_table = re.search(r"<table.*?</table>", content, re.DOTALL)
        cards.append({"stem": stem, "title": title, "image": image, "table": first_table, **card})
    score = claims.score(claims.judge(profile, seeds))
    index = template("index").render(profile=profile, cards=cards, score=score, scale=scale(profile))
    runs.write_atomically(folder / "index.html", index.encode())


def read_page(path):
    """What the index says of a page, its thumbnail, and all of it."""
    content = path.read_text(encoding="utf-8")
    card = json.loads(html.unescape(re.search(r'<meta name="card" content="(.*?)">', content)[1]))
    return card, thumbnail(content), content


def compact(png):
    """A PNG (base64) as the data: address of a lossless WebP; in 256 colours where that changes hardly a pixel.

    So the picture takes a third of its bytes or less. A plot has few colours; photographs keep all of theirs.
    """
    from PIL import Image, ImageChops, ImageStat

    drawn = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
    fewer = image.quantize(256, dither=Image.Dither.NONE).convert("RGB")
    if max(ImageStat.Stat(ImageChops.difference(image, fewer)).mean) < 1:  # of 255
        image = fewer
    return webp(image, lossless=True)


def webp(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "webp", **options)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(content, width=480):
    """The first picture of a page scaled to `width` pixels, as a data: address; None if there is none."""
    from PIL import Image

    found = re.search(r'src="data:image/webp;base64,([^"]+)"', content)
    if not found:
        return None
    image = Image.open(io.BytesIO(base64.b64decode(found[1])))
    size = width, round(image.height * width / image.width)
    return webp(image.resize(size, Image.Resampling.LANCZOS), quality=80)


def provenance(stem, profile, seeds):
    """What a page's numbers rest on: [(label, text)] of its line, and the counts for its card, from its records."""
    exhibits = NOTEBOOKS[stem][1]
    if not exhibits:
        return [("profile", profile)], {}
    grids = {name: EXHIBITS[name].grid(profile, seeds) for name in exhibits}
    grid = list(dict.fromkeys(run for runs_of_one in grids.values() for run in runs_of_one))
    records = runs.ensure(grid, profile, train=False)
    origins = [record.result["provenance"] for record in records.values()]
    parts = [part for origin in origins for part in origin.get("parts", [origin])]  # a run may go on elsewhere
    trained = sorted({origin["finished"][:10] for origin in origins})
    code = [part["silalib"].get("commit", part["silalib"]["code"]) for part in parts]
    data = [f"{dataset(r.dataset).title}, {o['train_images']:,} training images" for r, o in zip(records, origins)]
    planned, found = (", ".join(map(str, sorted({run.seed for run in group}))) for group in (grid, records))
    facts = [
        ("profile", profile),
        ("seeds", found if found in ("", planned) else f"{found} (planned: {planned})"),
        ("data", listed(data)),
        ("device", listed(part["device"] for part in parts)),
        ("precision", listed(part["precision"] for part in parts)),
        ("versions", listed(f"PyTorch {part['torch']}, Python {part['python']}" for part in parts)),
        ("trained", " to ".join(dict.fromkeys([*trained[:1], *trained[-1:]]))),
        ("code", listed(code)),
        ("runs", f"{len(records)} of {len(grid)}"),
        ("not trained alike", summary.mixed(records)),
    ]
    counts = {"runs": len(grid), "missing": len(grid) - len(records), "trained": sum(o["seconds"] for o in origins)}
    left_out = {run: runs.state(run) for run in grid if run not in records}
    counts["damaged"] = list(left_out.values()).count("damaged")
    counts["lacking"] = [name for name, runs_of_one in grids.items() if not records.keys() >= set(runs_of_one)]
    counts["failed"] = [runs.failure(run)["error"] for run, state in left_out.items() if state == "failed"]
    return [(label, text) for label, text in facts if text], counts


def listed(values):
    return "; ".join(dict.fromkeys(map(str, values)))


# From notebook to HTML


@cache
def template(name):
    """A template of silalib/templates; all of them have the style sheet inside."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup
    from nbconvert.filters.ansi import strip_ansi
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    folder = Path(__file__).parent / "templates"
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["style"] = Markup((folder / "style.css").read_text(encoding="utf-8"))
    environment.filters["python"] = lambda code: Markup(
        re.sub(UNSTYLED, r"\1", highlight(code, PythonLexer(), HtmlFormatter(nowrap=True)))
    )
    environment.filters["plain"] = strip_ansi
    environment.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    environment.filters["compact"] = compact
    environment.filters["duration"] = duration
    environment.filters["excerpt"] = excerpt
    return environment.get_template(f"{name}.html.j2")


UNSTYLED = r'<span class="(?!k|s|m|c|ow|n[bcdf]"|fm)\w+">([^<]*)</span>'
"""The classes of Pygments that style.css leaves alone: most of a page's code would be their names."""


def markdown_converter(profile):
    """A function from Markdown to HTML for the cells of one page, which share one outline."""
    from markupsafe import Markup
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        """Math as MathML, links to notebooks as links to their pages, headings in order with unique anchors."""

        level, anchors = 0, ()

        def inline_math(self, body):
            return mathml(body)

        def block_math(self, body):
            return f'<span class="math">{mathml(body, "block")}</span>'

        def latex_environment(self, name, body):
            return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")

        def heading(self, text, level, **attributes):
            self.level = min(max(level, 2 if self.level else 1), self.level + 1)
            anchor = html.escape(html.unescape(re.sub(r"<[^>]*>", "", text)).strip().replace(" ", "-"))
            while anchor in self.anchors:
                anchor += "-"
            self.anchors = (*self.anchors, anchor)
            link = f'<a class="anchor" href="#{anchor}" aria-label="Link to this section">#</a>'
            return f'<h{self.level} id="{anchor}">{text} {link}</h{self.level}>\n'

        def link(self, text, url, title=None):
            path, mark, anchor = url.partition("#")
            if Path(path).stem in NOTEBOOKS:
                url = f"{Path(path).stem}.html{mark}{anchor}"
            elif path and not re.match(r"\w+:", path):
                target = os.path.relpath(FOLDER / path, results_folder(profile) / "report")
                url = Path(target).as_posix() + mark + anchor
            return super().link(text, url, title)

    converter = MarkdownWithMath(renderer=Renderer(escape=False))
    punctuated = r"(<math display=.inline.>(?:(?!</math>).)*</math>)([.,;:!?)]+)"  # a line must not break in between
    return lambda source: Markup(re.sub(punctuated, r'<span class="unbroken">\1\2</span>', converter.render(source)))


ENVIRONMENTS = ("equation", "align", "split", "cases", "array", "matrix", "pmatrix", "bmatrix", "vmatrix", "substack")
"""What \\begin{...} may name; latex2mathml leaves out others without a word."""

UNKNOWN = r"\\\w*|(?<=<mi>)[&{}](?=</mi>)|<mo ?/>"
"""What latex2mathml leaves in its output where it did not understand the LaTeX."""


def mathml(tex, display="inline"):
    """LaTeX as a <math> element. Raises UserError for what latex2mathml does not know: it copies or drops it."""
    from latex2mathml.converter import convert

    formula = " ".join(tex.split())
    source = tex.replace("{aligned}", "{split}")  # the same in LaTeX
    try:
        result = convert(source, display=display)
    except Exception as error:
        raise UserError(f"cannot show the formula {formula} ({type(error).__name__})") from None
    unknown = re.findall(UNKNOWN, result) + list(set(re.findall(r"\\begin\{(\w+)\*?\}", source)) - set(ENVIRONMENTS))
    braces = re.sub(r"\\.", "", source)
    if unknown or braces.count("{") != braces.count("}"):
        raise UserError(f"cannot show the formula {formula}: {unknown[0] if unknown else 'a brace'} is not understood")
    for pattern, replacement in POLISH:
        result = re.sub(pattern, replacement, result)
    return result


POLISH = [
    (r' xmlns="[^"]*"', ""),
    (r"<m[io]>([A-Za-z]{2,})</m[io]>(?=<mo[^>]*>(?:&#x00028;|\())", r'<mo lspace="0.167em" rspace="0">\1</mo>'),
    (r"<m[io]>([A-Za-z]{2,})</m[io]>", r'<mo lspace="0.167em" rspace="0.167em">\1</mo>'),
    (r"(<mo[^>]*>(?:&#x0003D;|&#x00028;|&#x0002C;|\()</mo>)<mo>&#x02212;", r'\1<mo form="prefix">&#x02212;'),
    (r'(?:<mi mathvariant="normal">\w</mi>){2,}', lambda m: f"<mi>{re.sub('<[^>]*>', '', m[0])}</mi>"),
    (r"<mo>&#x0002F;", r'<mo lspace="0" rspace="0">&#x0002F;'),
    (r"(<mtext>\(\w+\)</mtext>)(?=</mrow></math>)", r'<mspace width="2em"/>\1'),
]
"""What latex2mathml leaves to do: LaTeX's spaces at named operators and signs, upright words in one piece, tags."""

TABLE = r"(?:<style[^>]*>[^<]*</style>\s*)?<table.*?</table>"  # the style is pandas' own and would win over ours
NUMBER = r"[\s<>≤≥≈~±+\-−–(\[]*\d[\d\s.,:;/%×±+\-−–()\[\]eE]*"


def tidy_table(match):
    """A table in a container that scrolls, with roles for its headers and class "number" on its numeric columns."""
    from bs4 import BeautifulSoup

    table = BeautifulSoup(match[0], "html.parser").table
    for tag in [table, *table.find_all(["th", "td"])]:  # pandas names every cell, with a new random number each time
        for name in ("id", "class", "border"):
            del tag[name]
    body = [row.find_all("td") for row in table.find_all("tr") if row.find("td")]
    heads = [row.find_all("th") for row in table.select("thead tr")]
    for column in range(min(map(len, body), default=0)):
        cells = [row[column] for row in body]
        texts = [text for cell in cells if (text := cell.get_text().strip())]
        if sum(bool(re.fullmatch(NUMBER, text)) for text in texts) > len(texts) / 2:
            # of a row of headers the last ones stand above the cells
            cells += [head[column - len(body[0])] for head in heads if len(head) >= len(body[0])]
            kind = "number"
        elif any(len(text) > 30 for text in texts):
            kind = "prose"
        else:
            kind = ""
        for cell in cells if kind else ():
            cell["class"] = kind
        if column == 0 and kind != "number" and not any(row.find("th") for row in table.select("tbody tr")):
            for cell in filter(lambda cell: cell.get_text().strip(), cells):
                cell.name = "th"
    for header in table.find_all("th"):
        if not header.get_text().strip():
            header.name = "td"  # an empty header says nothing of its cells
        elif header.find_parent("thead"):
            header["scope"] = "colgroup" if int(header.get("colspan", 1)) > 1 else "col"
        else:
            header["scope"] = "row"
    name = html.escape(table.caption.get_text().strip() if table.caption else "Table", quote=True)
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{name}">{table}</div>'


def excerpt(match, rows=6):
    """The first rows of a page's table, without what ties it to the page."""
    from bs4 import BeautifulSoup

    table = BeautifulSoup(match[0], "html.parser").table
    for part in [*table.find_all("caption"), *table.find_all("tr")[rows:]]:
        part.decompose()
    for tag in table.find_all(True):
        tag.attrs = {name: tag[name] for name in ("class", "colspan", "rowspan") if name in tag.attrs}
    return str(table)
