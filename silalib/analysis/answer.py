"""The answer in a minute: does SiLa work, should one use it, what would decide the rest. By the one rule, from the
records of every profile but quick, whose data are a stand-in; `paper` comes before `small`, and no number mixes them.
"""

import io
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..experiments import PROFILES
from ..losses import LABELS
from . import claims, plots, tables
from .evidence import TABLES, evidence
from .statistics import plus_minus, seeds
from .verdict import ClaimVerdict, Effect

SHOWN = tuple(reversed(PROFILES[1:]))

ALONE = "Better than training alone?"
EQUAL = "Better than one network at the same compute?"
CALIBRATED = "Better calibrated?"

QUESTIONS = {
    ALONE: ("1", "top-1, SiLa over IND"),
    EQUAL: ("A", "top-1"),
    "Better than DML?": ("2", "top-1, SiLa over DML"),
    CALIBRATED: ("B", "ECE, "),
    "Tighter features?": ("6", "scatter ratio"),
}
"""A reader's question -> the claim, and the beginning of the name of its effect, that answers it."""

WORDS = {
    "reproduced": "Yes", "negligible": "Not as claimed", "contradicted": "Not as claimed", "undecided": "Undecided",
    "not run": "Not known yet", "no verdict": "No verdict",
}  # fmt: skip
"""Verdict on claim 1 -> whether SiLa works."""

ADVICE = {
    "reproduced": {
        "reproduced": "Yes, where two networks can be trained together: it also beats one network at the same compute.",
        "negligible": "Hardly for accuracy: it gains nothing of interest over one network at the same compute.",
        "contradicted": "Not for accuracy: one network gains more at the same compute.",
        "": "Perhaps: it beats training alone; whether it beats one network at the same compute is open.",
    },
    "negligible": "Not for accuracy: it gains nothing of interest over training alone.",
    "contradicted": "Not for accuracy: it loses against training alone.",
    "undecided": "There is no reason yet: a gain in accuracy, if there is one, is lost in the spread over seeds.",
    "no verdict": "There is no verdict on its accuracy.",
    "": "Too early to say: not all planned seeds are trained.",
}
"""Verdict on the gain in top-1 over training alone -> advice; where that is reproduced, by that at equal compute."""


class Row(NamedTuple):
    """A question with the effect that answers it, and the profile whose records say so."""

    question: str
    profile: str
    effect: Effect


class Answer(NamedTuple):
    """rows: one for each question. judged: claim -> (profile, its verdict) by the best evidence. found: the records."""

    rows: list
    judged: dict
    found: dict


def collect():
    """Profile -> its `evidence.Evidence`, of those that have records; a damaged one is named and left out."""
    found = {profile: claims.collect(profile) for profile in SHOWN}
    return {profile: evidence for profile, evidence in found.items() if evidence.records}


def answer(found):
    """The `Answer` of profile -> `evidence.Evidence`."""
    every = {profile: {claim.name: claim for claim in claims.judge_all(found[profile])} for profile in found}
    every[""] = {claim.name: claim for claim in claims.judge_all(evidence({}, {}))}  # of what is counted without a run
    rows = []
    for question, (name, beginning) in QUESTIONS.items():
        sides = [(p, e) for p, judged in every.items() for e in judged[name].effects if e.name.startswith(beginning)]
        rows.append(Row(question, *best(sides, lambda effect: bool(effect.runs), Effect(beginning, ""))))
    judged = {}
    for name, (claim, *_) in (claims.CLAIMS | claims.OURS).items():
        sides = [(profile, found[name]) for profile, found in every.items()]
        judged[name] = best(sides, lambda claim: claim.verdict != "not run", ClaimVerdict(name, claim, ()))
    return Answer(rows, judged, found)


def best(sides, known, nothing):
    """(profile, effect or claim): the first with a verdict, else the first with records, else ("", nothing)."""
    with_verdict = [side for side in sides if side[1].verdict in claims.VERDICTS]
    return next(iter([*with_verdict, *(side for side in sides if known(side[1]))]), ("", nothing))


def table(answer):
    """The questions as a data frame to look at: question, ours, verdict, the paper, and what ours rests on."""
    rows = []
    for question, profile, effect in answer.rows:
        paper = "-" if np.isnan(effect.paper) else f"{effect.paper:+.{effect.digits}f}"
        where = f"{effect.name.partition('(')[2].rstrip(')')}{seeds([effect.seeds], '; ')}; profile {profile}"
        shown = [f"{effect}", effect.said, paper, where] if profile else ["not run", "-", "-", "-"]
        rows.append([question, *shown])
    return pd.DataFrame(rows, columns=["question", "ours", "verdict", "the paper", "measured on"])


def paragraphs(answer):
    """Heading -> what is to be said under it, as Markdown."""
    rows = {row.question: row for row in answer.rows}
    profile, first = answer.judged["1"]
    told = lambda name, row: f"{name} {row.effect}{seeds([row.effect.seeds], ', ')}, profile `{row.profile}`"
    beside = f": {told('top-1 over training alone', rows[ALONE])}" if rows[ALONE].profile else ""
    beside += f" (claim 1: {first.verdict})" if profile else ""
    verdict = rows[ALONE].effect.verdict
    advice = ADVICE.get(verdict, ADVICE[""])
    if isinstance(advice, dict):
        advice = advice.get(rows[EQUAL].effect.verdict, advice[""])
    if rows[CALIBRATED].profile:
        row = rows[CALIBRATED]
        mended = [effect for effect in answer.judged["B"][1].effects if effect.name.startswith(claims.SCALED)]
        scaled = "".join(f"; after temperature scaling {effect}" for effect in mended if str(effect))
        advice += f" Calibration error (ECE), IND minus SiLa: {told('', row).strip()} ({row.effect.said}){scaled}."
    paragraphs = {
        "Does SiLa work?": f"{WORDS.get(first.verdict, 'Not decided yet')}{beside}.",
        "Should I use it?": advice,
        "Which claims hold?": which_hold(answer),
        "What would decide the rest?": what_is_left(answer),
        "How far is this from the paper?": how_far(answer),
    }
    return {heading: text for heading, text in paragraphs.items() if text}


def which_hold(answer):
    """The paper's eight claims by verdict, with the profiles that say so."""
    groups = defaultdict(list)
    for name, (profile, claim) in answer.judged.items():
        if name in claims.CLAIMS:
            word = "in progress" if claim.verdict.startswith("so far") else claim.verdict
            groups[word, " by counting" if name == "8" else f" at `{profile}`" * bool(profile)].append(name)
    parts = [f"{word}{where}: {', '.join(names)}" for (word, where), names in sorted(groups.items())]
    return f"Of the paper's claims 1 to {len(claims.CLAIMS)}: {'; '.join(parts)}."


def what_is_left(answer):
    """How many runs are missing of those that the verdicts rest on, and what would decide the undecided ones."""
    lines = []
    for profile, found in answer.found.items():
        effects = [effect for claim in claims.judge_all(found) for effect in claim.primary]
        missing = {run for effect in effects for run in effect.awaited}
        if missing:
            every = missing | {run for effect in effects for run in effect.runs}
            runs = f"{len(missing)} of the {len(every)} runs that judge are missing"
            lines.append(f"At `{profile}` {runs}: `./run_all.sh {profile}`.")
    lines += [line for _, claim in answer.judged.values() for line in claims.what_decides(claim, timed=False)]
    if not lines:
        return "Every run that judges is trained." if answer.found else "`./run_all.sh small` trains on real data."
    return " ".join([*lines, "`python -m silalib status --profile small` says how many hours are left."])


def how_far(answer):
    """How the profiles differ from the paper's protocol, and what a network reaches there that is trained alone."""
    lines = [tables.scale(profile) for profile in answer.found]
    for name in TABLES:
        for profile, found in answer.found.items():
            done = [run for run in found.grids.get(name, ()) if run in found.records]
            rows = tables.over_seeds(done, found.records, ("top1",), name)
            for row in rows[rows["method"] == LABELS["ind"]].head(1).to_dict("records"):
                own = f"{plus_minus(row['mean'], row['half'])}% top-1{seeds([row['n']], ' (')}, {profile})"
                lines.append(
                    f"Alone, {row['network']} reaches {own} on {row['dataset']}; the paper {row['paper']:.2f}%."
                )
    return " ".join(filter(None, lines))


def in_markdown(answer, picture=""):
    """The whole answer as Markdown; picture: the address of `figure`, or none."""
    works, use, *rest = (f"**{heading}** {text}\n" for heading, text in paragraphs(answer).items())
    shown = [f"![The answers as intervals; the numbers are in the table]({picture})\n"] if picture else []
    return "\n".join([works, use, plots.markdown(table(answer)), *shown, *rest])


def in_lines(answer):
    """The answer for a terminal."""
    told = [f"{heading} {text.replace('`', '')}" for heading, text in paragraphs(answer).items()]
    return told[:2] + [f"  {line}" for line in in_rows(answer)] + told[2:]


def in_rows(answer):
    """A line for each question."""
    for question, ours, verdict, _, where in table(answer).itertuples(index=False):
        yield f"{question} {ours}" + f": {verdict} ({where})" * (where != "-")


def picture(answer):
    """`figure` as SVG that follows the reader's theme."""
    import matplotlib.pyplot as plt

    plots.use_style()
    fig, buffer = figure(answer), io.BytesIO()
    fig.savefig(buffer, format="svg", metadata=plots.UNDATED["svg"], bbox_inches="tight", transparent=True)
    plt.close(fig)
    return plots.themed(buffer.getvalue().decode(), "answer", "; ".join(in_rows(answer)))


def figure(answer):
    """The questions as intervals over seeds, each in a scale of its own about zero, beside the paper's number."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7.6, 0.9 + 0.62 * len(answer.rows)))
    for y, (question, profile, effect) in enumerate(answer.rows):
        ax.text(-1.15, y - 0.3, question, fontsize=11, weight="bold")
        ax.plot([0, 0], [y - 0.2, y + 0.28], color="#333333", linewidth=1)
        mean, half = effect.mean, 0 if np.isnan(effect.half_width) else effect.half_width
        size = 1.15 * np.nanmax([abs(mean) + half, effect.delta or 0, abs(effect.paper), 1e-9])
        if profile:
            ax.errorbar(mean / size, y, xerr=effect.half_width / size, fmt="o", color=plots.COLOURS["sila"])
            ax.plot(effect.paper / size, y, "D", color="black", fillstyle="none", markersize=9)
            ax.plot([(effect.delta or np.nan) / size] * 2, [y - 0.2, y + 0.2], color="#777777", linestyle=":")
        told = f"{effect}\n{effect.said}, {profile}" if profile else "not run"
        ax.text(1.1, y, told, va="center", fontsize=9)
    ax.errorbar([], [], xerr=[], fmt="o", color=plots.COLOURS["sila"], label="ours, 95% over seeds")
    ax.plot([], [], "D", color="black", fillstyle="none", markersize=9, label="the paper")
    ax.plot([], [], color="#777777", linestyle=":", label="smallest effect of interest")
    ax.set(xlim=(-1.15, 1.08), ylim=(len(answer.rows) - 0.5, -0.7), xticks=[-0.55, 0.55], yticks=[])
    ax.set_xticklabels(["← SiLa is worse", "SiLa is better →"])
    ax.set_xlabel("each row has its own scale")
    ax.grid(False)
    ax.tick_params(bottom=False)
    ax.spines[:].set_visible(False)
    fig.legend(loc="outside lower center", ncols=3)
    return fig
