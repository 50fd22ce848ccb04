"""The answer in a minute: does SiLa work, should one use it, what would decide the rest. By the one rule, from the
records of every profile but quick, whose data are a stand-in; `paper` comes before `small`, and no number mixes them.
Its words are in answer.md.j2.
"""

from collections import defaultdict, namedtuple
from importlib.resources import files

import numpy as np
import pandas as pd

from ..experiments import PROFILES
from ..losses import LABELS
from . import claims, plots, tables
from .evidence import TABLES, evidence
from .statistics import plus_minus, seeds
from .verdict import Effect

QUESTIONS = {
    "Better than training alone?": ("1", "top-1, SiLa over IND"),
    "Better than one network at the same compute?": ("A", "top-1"),
    "Better than DML?": ("2", "top-1, SiLa over DML"),
    "Better calibrated?": ("B", "ECE, "),
    "Tighter features?": ("6", "scatter ratio"),
}
"""A reader's question -> the claim, and the beginning of the name of its effect, that answers it."""


Row = namedtuple("Row", "question profile effect")
"""A question with the effect that answers it, and the profile whose records say so."""

Answer = namedtuple("Answer", "rows best judged found")
"""rows: one for each question. best: claim -> (profile, its verdict) by the best evidence. judged: profile -> claim ->
its verdict. found: profile -> `evidence.Evidence`."""


def collect():
    """Profile -> its `evidence.Evidence`, of those that have records; a damaged one is named and left out."""
    found = {profile: claims.collect(profile) for profile in reversed(PROFILES[1:])}
    return {profile: evidence for profile, evidence in found.items() if evidence.records}


def answer(found):
    """The `Answer` of profile -> `evidence.Evidence`."""
    judged = {profile: {claim.name: claim for claim in claims.judge_all(found[profile])} for profile in found}
    counted = {claim.name: claim for claim in claims.judge_all(evidence({}, {}))}  # without a run
    every, rows = judged | {"": counted}, []
    for question, (name, beginning) in QUESTIONS.items():
        sides = [(p, e) for p, own in every.items() for e in own[name].effects if e.name.startswith(beginning)]
        rows.append(Row(question, *best(sides, lambda effect: bool(effect.runs), Effect(beginning, ""))))
    known = lambda claim: claim.verdict != "not run"
    chosen = {name: best([(p, own[name]) for p, own in every.items()], known, counted[name]) for name in counted}
    return Answer(rows, chosen, judged, found)


def best(sides, known, nothing):
    """(profile, effect or claim): the first with a verdict, else the first with records, else ("", nothing)."""
    with_verdict = [side for side in sides if side[1].verdict in claims.VERDICTS]
    return next(iter([*with_verdict, *(side for side in sides if known(side[1]))]), ("", nothing))


def table(answer):
    """The questions as a data frame to look at: question, ours, verdict, the paper, and what ours rests on."""
    rows = []
    for question, profile, effect in answer.rows:
        where = f"{effect.name.partition('(')[2].rstrip(')')}{seeds([effect.seeds], '; ')}; profile {profile}"
        shown = [f"{effect}", effect.said, effect.papers, where] if profile else ["not run", "-", "-", "-"]
        rows.append([question, *shown])
    return pd.DataFrame(rows, columns=["question", "ours", "verdict", "the paper", "measured on"])


def told(answer, shown):
    """The answer as Markdown, with `shown` in the place of its table."""
    from jinja2 import Template

    groups, left, alone = defaultdict(list), [], []
    for name in claims.CLAIMS:
        profile, claim = answer.best[name]
        word = "in progress" if claim.verdict.startswith("so far") else claim.verdict
        groups[word, " by counting" if name == "8" else f" at `{profile}`" * bool(profile)].append(name)
    for profile, judged in answer.judged.items():
        effects = [effect for claim in judged.values() for effect in claim.primary]
        missing = {run for effect in effects for run in effect.awaited}
        left.append((profile, len(missing), len(missing.union(*(effect.runs for effect in effects)))))
    for exhibit in TABLES:
        for profile, found in answer.found.items():
            done = [run for run in found.grids.get(exhibit, ()) if run in found.records]
            rows = tables.over_seeds(done, found.records, ("top1",), exhibit)
            alone += [(profile, row) for row in rows[rows["method"] == LABELS["ind"]].head(1).itertuples()]
    content = files("silalib.analysis").joinpath("answer.md.j2").read_text(encoding="utf-8")
    return Template(content, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).render(
        rows=answer.rows, best=answer.best, groups=sorted(groups.items()), left=left, trained_alone=alone,
        deciding=[line for _, claim in answer.best.values() for line in claims.what_decides(claim, timed=False)],
        scaled=[e for e in answer.best["B"][1].effects if e.name.startswith(claims.SCALED) and str(e)],
        scales=list(filter(None, map(tables.scale, answer.found))),
        shown=shown, papers=claims.CLAIMS, seeds=seeds, plus_minus=plus_minus,
    )  # fmt: skip


def in_markdown(answer, picture=""):
    """The whole answer as Markdown; picture: the address of `picture`, or none."""
    shown = f"\n![The answers as intervals; the numbers are in the table]({picture})\n" if picture else ""
    return told(answer, plots.markdown(table(answer)) + shown)


def in_lines(answer):
    """The answer for a terminal."""
    text = told(answer, "".join(f"  {line}\n" for line in in_rows(answer)))
    return [line for line in text.replace("**", "").replace("`", "").splitlines() if line]


def in_rows(answer):
    """A line for each question."""
    for question, ours, verdict, _, where in table(answer).itertuples(index=False):
        yield f"{question} {ours}" + f": {verdict} ({where})" * (where != "-")


def picture(answer):
    """The questions as intervals over seeds, each in a scale of its own about zero, beside the paper's number: an SVG
    that follows the reader's theme."""
    plots.use_style()
    fig, ax = plots.plt.subplots(figsize=(7.6, 0.9 + 0.62 * len(answer.rows)))
    ours = dict(fmt="o", color=plots.COLOURS["sila"])
    paper = dict(marker="D", linestyle="", color="black", fillstyle="none", markersize=9)
    least = dict(color="#777777", linestyle=":")
    for y, (question, profile, effect) in enumerate(answer.rows):
        ax.text(-1.15, y - 0.3, question, fontsize=11, weight="bold")
        ax.plot([0, 0], [y - 0.2, y + 0.28], color="#333333", linewidth=1)
        size = 1.15 * np.nanmax([abs(effect.mean) + np.nan_to_num(effect.half_width), effect.delta or 0,
                                 abs(effect.paper), 1e-9])  # fmt: skip
        if profile:
            ax.errorbar(effect.mean / size, y, xerr=effect.half_width / size, **ours)
            ax.plot(effect.paper / size, y, **paper)
            ax.plot([(effect.delta or np.nan) / size] * 2, [y - 0.2, y + 0.2], **least)
        told = f"{effect}\n{effect.said}, {profile}" if profile else "not run"
        ax.text(1.1, y, told, va="center", fontsize=9)
    ax.errorbar([], [], xerr=[], label="ours, 95% over seeds", **ours)
    ax.plot([], [], label="the paper", **paper)
    ax.plot([], [], label="smallest effect of interest", **least)
    ax.set(xlim=(-1.15, 1.08), ylim=(len(answer.rows) - 0.5, -0.7), xlabel="each row has its own scale", yticks=[])
    ax.set_xticks([-0.55, 0.55], ["← SiLa is worse", "SiLa is better →"])
    ax.grid(False)
    ax.tick_params(bottom=False)
    ax.spines[:].set_visible(False)
    fig.legend(loc="outside lower center", ncols=3)
    drawn = plots.in_format(fig, "svg").decode()
    plots.plt.close(fig)
    return plots.themed(drawn, "answer", "; ".join(in_rows(answer)))
