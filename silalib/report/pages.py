"""Render the executed notebooks: one HTML page each, and an index, in results/<profile>/report.

Every page is one file that fetches nothing: style, pictures and math (as MathML) are inside; one page has a script.
nbconvert takes seconds to import, so it is imported where it is used.
"""

import html
import json
import os
import re
import tomllib
from functools import cache
from itertools import chain
from pathlib import Path

from .. import files, records
from ..analysis import claims, plots, tables
from ..analysis.status import recall
from ..data import dataset
from ..experiments import EXHIBITS, PROFILES, check_profile
from ..launch.ensure import ensure
from .notebooks import CONTENTS, FOLDER, PageFailed, contents

RULES = tomllib.loads((files.PACKAGE / "report" / "html.toml").read_text(encoding="utf-8"))
EXTERNAL = "|".join(RULES["external"])


class Report:
    """The pages of one profile, in `folder`. seeds: those asked for, or None for the profile's own."""

    def __init__(self, profile, seeds=None, source=FOLDER, exhibits=EXHIBITS):
        check_profile(profile)
        self.profile, self.seeds, self.source, self.exhibits = profile, seeds, source, exhibits
        self.folder = files.results_folder(profile) / "report"
        self.notebooks = contents(exhibits)

    def notebook_page(self, stem, notebook, inputs=""):
        """The page of an executed notebook. inputs: a checksum of what it is made of, for the page's head. Raises
        PageFailed for unknown math, or something outside of the page."""
        parts = dict(cells=notebook.cells, markdown=markdown_converter(self))
        body = template("cells.html").render(report=self, stem=stem, **parts)
        if found := re.search(EXTERNAL, body):
            raise PageFailed(f"{stem}.ipynb shows something from outside of the page: {found[0][:80]}")
        heading, end, rest = with_roles(body).rpartition("</h1>")
        facts, counts = self.provenance(stem)
        beside = {"notebook": self.source / f"{stem}.ipynb"}
        beside |= {f"profile {p}": files.results_folder(p) / "report" / f"{stem}.html" for p in PROFILES}
        parts = dict(heading=heading + end, facts=facts, body=rest, beside=beside)
        return self.page(stem, "done", counts | {"inputs": inputs}, **parts)

    def address(self, path):
        """A path as seen from the pages."""
        return Path(os.path.relpath(path, self.folder)).as_posix()

    def page(self, stem, state, counts=(), error="", **parts):
        """A page, "done", "failed" or "not built", with its navigation. What the index says of it is in its head."""
        card = {"state": state, "error": error, **dict(counts)}
        return template("page.html").render(report=self, stem=stem, card=card, **parts)

    def write_index(self):
        """The index of all pages; one that is missing is written as "not built", so that every link leads somewhere."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.unwritable(self.folder, error) from None
        cards = []
        for stem, (title, _) in self.notebooks.items():
            path = self.folder / f"{stem}.html"
            card = read_card(path)
            if not card:
                files.write_atomically(path, self.page(stem, "not built").encode())
            cards.append({"stem": stem, "title": title, "state": "not built", **card})
        judged = {claim.name: claim for claim in claims.judge(self.profile, self.seeds)}
        kept, words = recall(), dict(score=claims.score(judged.values()), scale=tables.scale(self.profile))
        words |= dict(answer=with_roles(markdown_converter(self)(kept["markdown"], foreign=True)), judged=judged)
        results, picture = CONTENTS["results"], kept["picture"]
        index = template("index.html").render(report=self, cards=cards, results=results, picture=picture, **words)
        files.write_atomically(self.folder / "index.html", index.encode())

    def provenance(self, stem):
        """What a page's numbers rest on: label -> texts of its line, and the counts for its card, from its records."""
        grids = {name: self.exhibits[name].grid(self.profile, self.seeds) for name in self.notebooks[stem][1]}
        grid = list(dict.fromkeys(chain(*grids.values())))
        found = ensure(grid, self.profile, train=False)
        left_out = {run: records.state(run, self.profile) for run in grid if run not in found}
        origins = [record.result["provenance"] for record in found.values()]
        parts = [part for origin in origins for part in origin.get("parts", [origin])]  # a run may resume elsewhere
        trained = sorted(origin["finished"][:10] for origin in origins)
        title = lambda run: dataset(run.dataset).title
        planned, seeds = (", ".join(map(str, sorted({run.seed for run in runs}))) for runs in (grid, found))
        facts = {
            "profile": [self.profile],
            "seeds": [seeds if seeds in ("", planned) else f"{seeds} (planned: {planned})"],
            "data": [f"{title(run)}, {o['train_images']:,} training images" for run, o in zip(found, origins)],
            "device": [part["device"] for part in parts],
            "precision": [part["precision"] for part in parts],
            "versions": [f"PyTorch {part['torch']}, Python {part['python']}" for part in parts],
            "trained": [" to ".join(dict.fromkeys([*trained[:1], *trained[-1:]]))],
            "code": [part["silalib"].get("commit", part["silalib"]["code"]) for part in parts],
            "runs": [f"{len(found)} of {len(grid)}" if grid else ""],
            "not trained alike": [tables.mixed(found)],
        }
        counts = {
            "runs": len(grid),
            "missing": len(left_out),
            "damaged": list(left_out.values()).count("damaged"),
            "failed": [records.failure(run)["error"] for run, state in left_out.items() if state == "failed"],
            "lacking": [name for name, runs in grids.items() if not found.keys() >= set(runs)],
            "records": [run.key for run in found],
            "trained": sum(origin["seconds"] for origin in origins),
        }
        return facts, counts


CARD = {"state": lambda value: value in ("done", "failed", "not built"), ...: lambda value: True}
CARD |= dict.fromkeys(("runs?", "missing?", "damaged?", "trained?"), files.is_number)
"""The form of what a page's head says of it."""


def read_card(path):
    """What the index says of a page: what is in its head, and its thumbnail. Of one that is missing or damaged: {}."""
    try:
        content = path.read_text(encoding="utf-8")
        card = json.loads(html.unescape(re.search(r'<meta name="card" content="(.*?)">', content)[1]))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    if not files.fits(card, CARD):
        return {}
    thumbnail = re.search("<template>(.*?)</template>", content, re.DOTALL)
    return {**card, "thumbnail": thumbnail[1] if thumbnail and not re.search(EXTERNAL, thumbnail[1]) else ""}


@cache
def template(name):
    """A template of silalib/report/templates."""
    from jinja2 import Environment, PackageLoader, select_autoescape
    from nbconvert.filters import Highlight2HTML, strip_ansi

    options = dict(autoescape=select_autoescape(["html.j2"]), trim_blocks=True, lstrip_blocks=True)
    environment = Environment(loader=PackageLoader("silalib.report"), **options)
    python = lambda code: by_rules("plain_code", Highlight2HTML("python")(code))
    filters = {"python": python, "plain": strip_ansi, "themed": plots.themed, "in_markdown": plots.in_markdown}
    environment.filters |= filters
    return environment.get_template(f"{name}.j2")


def markdown_converter(report):
    """A function from Markdown to HTML for the cells of one page, which share one outline. Its second argument: whether
    the text is foreign, what a cell's code has made of records; then HTML in it is text."""
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        """Math as MathML, links to notebooks as links to their pages, headings in order with unique anchors."""

        level, anchors = 0, []

        def inline_math(self, body):
            return mathml(body)

        def block_math(self, body):
            return f'<span class="math" tabindex="0">{mathml(body, "block")}</span>'

        def latex_environment(self, name, body):
            return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")

        def heading(self, text, level, **attributes):
            self.level = min(max(level, 2 if self.level else 1), self.level + 1)
            anchor = re.sub(r"<[^>]*>", "", text).strip().replace(" ", "-")
            self.anchors = [*self.anchors, anchor]
            anchor += "-" * (self.anchors.count(anchor) - 1)
            link = f'<a class="anchor" href="#{anchor}" aria-label="Link to this section">#</a>'
            return f'<h{self.level} id="{anchor}">{text} {link}</h{self.level}>\n'

        def link(self, text, url, title=None):
            path, mark, anchor = url.partition("#")
            if Path(path).stem in report.notebooks:
                url = f"{Path(path).stem}.html{mark}{anchor}"
            elif path and not re.match(r"\w+:", path):
                url = report.address(report.source / path) + mark + anchor
            return super().link(text, url, title)

    renderer = Renderer(escape=False, allow_harmful_protocols=False)
    converter = MarkdownWithMath(renderer=renderer)
    punctuated = r"(<math[^>]*inline.>(?:(?!</math>).)*</math>)([.,;:!?)]+)"  # a line must not break in between

    def convert(source, foreign=False):
        renderer._escape = foreign
        return re.sub(punctuated, r'<span class="unbroken">\1\2</span>', converter.render(source))

    return convert


def mathml(tex, display="inline"):
    """LaTeX as a <math> element. Raises PageFailed for a command that latex2mathml does not know and copies."""
    from latex2mathml.converter import convert

    result = convert(tex.replace("{aligned}", "{split}"), display=display)  # the same in LaTeX
    if unknown := re.search(r"\\\w*|<mi>&</mi>", result):
        raise PageFailed(f"cannot show the formula {' '.join(tex.split())}: {unknown[0]} is not understood")
    return by_rules("math_spaces", result)


def by_rules(name, text):
    for pattern, replacement in RULES[name]:
        text = re.sub(pattern, replacement, text)
    return text


def with_roles(text):
    """HTML with each table in a box that scrolls, and with roles for the headers."""

    def boxed(table):
        content, caption = by_rules("table_roles", table[0]), re.search(r"<caption>(.*?)</caption>", table[0])
        content = re.sub(r"\$([^$<]+)\$", lambda found: mathml(html.unescape(found[1])), content)
        name = caption[1] if caption else ", ".join(re.findall(r"<th[^>]*>([^<]+)</th>", content)[:3]) or "Table"
        name = name.replace('"', "&quot;").replace("$", "")
        return f'<div class="scroll" role="region" tabindex="0" aria-label="{name}">{content}</div>'

    return re.sub(r"(?:<style[^>]*>[^<]*</style>\s*)?<table.*?</table>", boxed, text, flags=re.DOTALL)
