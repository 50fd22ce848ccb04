"""The answer in a minute: does SiLa work, should one use it, what would decide the rest. By the one rule, from the
records of every profile but quick, whose data are a stand-in; `paper` comes before `small`, and no number mixes them.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..experiments import PROFILES, tiers
from ..losses import LABELS
from . import claims, plots, statistics, tables
from .claims import VERDICTS
from .statistics import ClaimVerdict, Effect

SHOWN = tuple(reversed(PROFILES[1:]))

ALONE = "Better than training alone?"
EQUAL = "Better than one network at the same compute?"
CALIBRATED = "Better calibrated?"

QUESTIONS = {
    ALONE: ("1", "top-1, SiLa over IND"),
    EQUAL: ("A", "top-1"),
    "Better than DML?": ("2", "top-1, SiLa over DML"),
    CALIBRATED: ("B", "ECE"),
    "Tighter features?": ("6", "scatter ratio"),
}
"""A reader's question -> the claim, and the beginning of the name of its effect, that answers it."""

WORDS = {
    "reproduced": "Yes", "negligible": "No gain of interest", "contradicted": "No", "undecided": "Undecided",
    "not run": "Not known yet", "no verdict": "Undecided",
}  # fmt: skip

OPEN = "It is not known yet whether it beats one network at the same compute."

ADVICE = {
    "reproduced": {
        "reproduced": "Yes, where two networks can be trained together: it also beats one network at the same compute.",
        "negligible": "Not for accuracy: one network trained for twice as long gains as much for the same compute.",
        "contradicted": "Not for accuracy: one network trained for twice as long gains more for the same compute.",
    },
    "negligible": "Not for accuracy: it gains nothing of interest over training alone.",
    "contradicted": "Not for accuracy: it loses against training alone.",
    "undecided": "There is no reason yet: a gain in accuracy, if there is one, is lost in the spread over seeds.",
}
"""Verdict on the gain over training alone -> advice; where that is reproduced, by the verdict at equal compute."""


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
    """Profile -> its `claims.Evidence`, of those that have records; a damaged one is named and left out."""
    found = {profile: claims.collect(profile) for profile in SHOWN}
    return {profile: evidence for profile, evidence in found.items() if evidence.records}


def answer(found):
    """The `Answer` of profile -> `claims.Evidence`."""
    every = {profile: {claim.name: claim for claim in claims.judge_all(found[profile])} for profile in found}
    rows = []
    for question, (name, beginning) in QUESTIONS.items():
        sides = [(p, e) for p, judged in every.items() for e in judged[name].effects if e.name.startswith(beginning)]
        rows.append(Row(question, *best(sides, lambda effect: bool(effect.runs), Effect(beginning, ""))))
    names = claims.CLAIMS | claims.OURS
    nothing = {name: ClaimVerdict(name, claim, ()) for name, (claim, *_) in names.items()}
    sides = {name: [(profile, judged[name]) for profile, judged in every.items()] for name in names}
    judged = {name: best(sides[name], lambda claim: claim.verdict != "not run", nothing[name]) for name in names}
    return Answer(rows, judged, found)


def best(sides, known, nothing):
    """(profile, effect or claim): the first with a verdict, else the first with records, else ("", nothing)."""
    with_verdict = [side for side in sides if side[1].verdict in VERDICTS]
    return next(iter([*with_verdict, *(side for side in sides if known(side[1]))]), ("", nothing))


def table(answer):
    """The questions as a data frame to look at: question, the paper, ours, verdict."""
    rows = []
    for question, profile, effect in answer.rows:
        paper = "-" if np.isnan(effect.paper) else f"{effect.paper:+.{effect.digits}f}"
        ours = f"{effect} ({effect.name.split('(')[-1].rstrip(')')}; {profile})" if profile else "not run"
        rows.append([question, paper, ours, said(effect)])
    return pd.DataFrame(rows, columns=["question", "the paper", "ours", "verdict"])


def said(effect):
    """What the rule says of an effect, in a cell of a table."""
    if effect.delta is None and not effect.exact:
        return f"shown, judges nothing{statistics.seeds([effect.seeds], '; ')}" if effect.runs else "not run"
    return f"{effect.verdict} ({effect.remark})" if effect.remark else effect.verdict


def paragraphs(answer):
    """Heading -> what is to be said under it, as Markdown."""
    effects = {row.question: row.effect for row in answer.rows}
    alone, equal, calibrated = (effects[question] for question in (ALONE, EQUAL, CALIBRATED))
    beside = f": {alone} of top-1 over training alone ({alone.verdict})" if alone.runs else ""
    advice = ADVICE.get(alone.verdict, "Too early to say: not all planned seeds are trained.")
    if isinstance(advice, dict):
        advice = advice.get(equal.verdict, f"Perhaps: it beats training alone. {OPEN}")
    if calibrated.runs:
        advice += f" Calibration error (ECE) of IND minus SiLa's: {calibrated} ({calibrated.verdict})."
    told = {
        "Does SiLa work?": f"{WORDS.get(alone.verdict, 'Not decided yet')}{beside}.",
        "Should I use it?": advice,
        "Which claims hold?": which_hold(answer),
        "What would decide the rest?": what_is_left(answer),
        "How far is this from the paper?": how_far(answer),
    }
    return {heading: text for heading, text in told.items() if text}


def which_hold(answer):
    """The paper's eight claims by verdict, with the profiles that say so."""
    groups = defaultdict(list)
    for name, (profile, claim) in answer.judged.items():
        if name in claims.CLAIMS:
            word = "in progress" if claim.verdict.startswith("so far") else claim.verdict
            where = f" at `{profile}`" if profile and name != "8" else " by counting" * bool(profile)
            groups[word, where].append(name)
    parts = [f"{word}{where}: {', '.join(names)}" for (word, where), names in sorted(groups.items())]
    return f"Of the paper's claims 1 to {len(claims.CLAIMS)}: {'; '.join(parts)}."


def what_is_left(answer):
    """How many of the runs that judge are not trained yet, and the command that trains them."""
    lines = []
    for profile, evidence in answer.found.items():
        judging = [run for run, tier in tiers(profile).items() if tier < 3]
        left = [run for run in judging if run not in evidence.records and claims.worth(run)]
        if left:
            lines.append(f"{len(left)} of the {len(judging)} runs that judge `{profile}` are still missing")
    if not lines:
        return "Every planned run is trained." if answer.found else "`./run_all.sh small` trains on real data."
    how = "`./run_all.sh small` goes on with them, `python -m silalib status --profile small` says for how many hours"
    return f"{'; '.join(lines)}. {how}."


def how_far(answer):
    """How the profiles differ from the paper's protocol, and what a network reaches there that is trained alone."""
    lines = [tables.scale(profile) for profile in answer.found]
    for name in claims.TABLES:
        for evidence in answer.found.values():
            done = [run for run in evidence.grids.get(name, ()) if run in evidence.records]
            cells = tables.cells(done, evidence.records, ("top1",), name)
            alone = tables.over_seeds(cells[cells["value"].notna() & (cells["method"] == LABELS["ind"])])
            for row in alone.head(1).to_dict("records"):
                own, paper = statistics.plus_minus(row["mean"], row["half"]), f"{row['paper']:.2f}%"
                lines.append(f"Alone, {row['network']} reaches {own}% top-1 on {row['dataset']}, in the paper {paper}.")
    return " ".join(filter(None, lines))


def in_markdown(answer, picture=""):
    """The whole answer as Markdown; picture: the address of `figure`, or none."""
    works, use, *rest = (f"**{heading}** {text}\n" for heading, text in paragraphs(answer).items())
    shown = [f"![The answers as intervals; the numbers are in the table]({picture})\n"] if picture else []
    return "\n".join([works, use, plots.markdown(table(answer)), *shown, *rest])


def in_lines(answer):
    """The answer for a terminal."""
    rows = table(answer).itertuples(index=False)
    told = [f"{heading} {text.replace('`', '')}" for heading, text in paragraphs(answer).items()]
    return told[:2] + [f"  {question} {ours}: {verdict}" for question, _, ours, verdict in rows] + told[2:]


def figure(answer):
    """The questions as intervals over seeds, each in a scale of its own about zero, beside the paper's number."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7.6, 0.9 + 0.62 * len(answer.rows)))
    for y, (question, profile, effect) in enumerate(answer.rows):
        ax.text(-1.15, y - 0.3, question, fontsize=11, weight="bold")
        mean, half = effect.mean, 0 if np.isnan(effect.half_width) else effect.half_width
        size = 1.15 * np.nanmax([abs(mean) + half, effect.delta or 0, abs(effect.paper), 1e-9])
        if profile:
            ax.errorbar(mean / size, y, xerr=effect.half_width / size, fmt="o", color=plots.COLOURS["sila"])
            ax.plot(effect.paper / size, y, "D", color="black", fillstyle="none", markersize=9)
            ax.plot([(effect.delta or np.nan) / size] * 2, [y - 0.2, y + 0.2], color="#777777", linestyle=":")
        told = f"{effect}\n{said(effect)}, {profile}" if profile else "not run"
        ax.text(1.1, y, told, va="center", fontsize=9)
    ax.errorbar([], [], xerr=[], fmt="o", color=plots.COLOURS["sila"], label="ours, 95% over seeds")
    ax.plot([], [], "D", color="black", fillstyle="none", markersize=9, label="the paper")
    ax.plot([], [], color="#777777", linestyle=":", label="smallest effect of interest")
    ax.axvline(0, color="#333333", linewidth=1)
    ax.set(xlim=(-1.15, 1.08), ylim=(len(answer.rows) - 0.5, -0.7), xticks=[-0.55, 0.55], yticks=[])
    ax.set_xticklabels(["← SiLa is worse", "SiLa is better →"])
    ax.grid(False)
    ax.tick_params(bottom=False)
    ax.spines[:].set_visible(False)
    fig.legend(loc="outside lower center", ncols=3)
    return fig
