"""What stands on a git host, made from the committed records: python -m silalib.report.readme.

README.md between its marks, docs/images/answer.svg and results/answer.json have the answer; results/README.md has
every verdict, what was trained, and the main figures and tables beside the records. A test makes all of it again.
"""

import re
import sys

import numpy as np
import pandas as pd

from ..analysis import answer, claims, plots, statistics, status
from ..errors import UserError
from ..experiments import EXHIBITS
from ..files import ROOT, to_json, write_atomically
from ..launch.progress import duration
from ..records import find

MARKED = re.compile(r"(?<=<!-- measured -->\n).*(?=<!-- end -->)", re.DOTALL)

PICTURE = "docs/images/answer.svg"

MAIN = {
    "table1": ("table1_gains", "table1a"), "table3": ("table3_cifar100_gains", "table3_cifar100"),
    "fig3": ("fig3", "fig3_training"), "fig4": ("fig4", "fig4_gains"), "fig5": ("fig5", "fig5"),
    "fig6": ("fig6", "fig6"), "fig7": ("fig7a", "fig7a"), "equal_compute": ("equal_compute", "equal_compute"),
    "coupling": ("coupling_ensembles", "coupling"), "regime": ("regime", "regime"), "choices": ("choices", "choices"),
}  # fmt: skip
"""Exhibit -> its main figure and table, which are kept in git."""

INTRODUCTION = """# Results

Made by `python -m silalib.report.readme` from the records in this folder. Each profile's pages are in
`<profile>/report/index.html` of a checkout; [the protocol](../docs/protocol.md#what-is-judged) says what is judged.

"""

EXPLANATION = """
IND: trained independently. DML: deep mutual learning. A number is a mean over networks, exits or costs, with its 95%
interval over seeds; positive supports the claim. The paper's is the mean of what it prints: of two equal networks with
SiLa that is Net1 alone. A and B are questions of our own. No number mixes two profiles.
"""


def main():
    try:
        for name, content in render(collect()).items():
            write_atomically(ROOT / name, content)
    except UserError as error:
        sys.exit(f"silalib: {error}")


def collect():
    """Profile -> its `evidence.Evidence`. Raises UserError where a record cannot be read."""
    found = answer.collect()
    for evidence in found.values():
        for run in planned(evidence):
            if run not in evidence.records and (folder := find(run)):
                raise UserError(f"{folder} has no whole record: README is made from whole ones alone")
    return found


def render(found, root=ROOT):
    """File -> its bytes, made of profile -> `evidence.Evidence`. Raises UserError where README.md has no marks."""
    whole, parts = answer.answer(found), [INTRODUCTION]
    parts += [answer.in_markdown(whole, f"../{PICTURE}"), "\n## Every verdict\n", EXPLANATION]
    for profile, evidence in found.items():
        judged = claims.judge_all(evidence)
        rows = [row for claim in judged for row in of_claim(claim)]
        header = ["claim", "what is compared", "the paper prints", "measured", "verdict"]
        parts += [f"\n### Profile {profile}\n", plots.markdown(pd.DataFrame(rows, columns=header))]
        if left := [f"{claim.name}. {claim.claim}" for claim in judged if claim.verdict == "not run"]:
            parts += [f"\nNot run: {'; '.join(left)}.\n"]
    trained_for = ["trained for", "profile", "training", "runs", "seeds", "time", "hardware"]
    parts += ["\n## What was trained\n", plots.markdown(pd.DataFrame(trainings(found), columns=trained_for))]
    parts += [part for profile, evidence in found.items() for part in exhibits(profile, evidence, root)]
    before = (root / "README.md").read_text(encoding="utf-8")
    if not MARKED.search(before):
        raise UserError("README.md has no place between <!-- measured --> and <!-- end -->")
    kept = status.keep(whole)
    return {
        "README.md": MARKED.sub(lambda _: f"\n{answer.in_markdown(whole, PICTURE)}\n", before).encode(),
        "results/README.md": ("\n".join(parts) + "\n").encode(),
        "results/answer.json": to_json(kept),
        PICTURE: kept["picture"].encode(),
    }


def planned(evidence):
    """Every run of the grids -> the first exhibit that has it."""
    return {run: name for name, grid in reversed(evidence.grids.items()) for run in grid}


def of_claim(claim):
    """Rows of a claim's primary effects that have records."""
    for effect in claim.primary:
        if effect.runs or effect.exact:
            paper = "-" if np.isnan(effect.paper) else f"{effect.paper:+.{effect.digits}f}"
            seeds = statistics.seeds([effect.seeds], ", ")
            yield [f"{claim.name}. {claim.claim}", effect.name, paper, f"{effect}{seeds}", effect.said]


def exhibits(profile, evidence, root):
    """The main figure and table of each exhibit that has records, of its own or of those that it is made for."""
    shared = {run for name in ("fig6", "fig7") for run in evidence.grids[name]}  # others add runs to these
    for name, (figure, table) in MAIN.items():
        own = set(evidence.grids[name])
        if not evidence.records.keys() & (own - shared if own > shared & own and name != "table1" else own):
            continue
        title, notebook = EXHIBITS[name].title, EXHIBITS[name].notebook
        yield f"\n## {title} (profile {profile})\n"
        if (root / "results" / profile / "figures" / f"{figure}.svg").exists():
            yield f"![{title}]({profile}/figures/{figure}.svg)\n"
        if (text := root / "results" / profile / "tables" / f"{table}.md").exists():
            yield text.read_text(encoding="utf-8")
        page = f"[page]({profile}/report/{notebook}.html) (HTML: open it in a checkout)"
        yield f"{page} · [notebook](../notebooks/{notebook}.ipynb) · [records]({profile}/runs)"


def trainings(found):
    """Rows of what was trained: for how long, with which seeds, on what."""
    for profile, evidence in found.items():
        first = planned(evidence)
        for name in [name for name in EXHIBITS if name in {first[run] for run in evidence.records}]:
            runs = [run for run in first if first[run] == name]
            done = [run for run in runs if run in evidence.records]
            origins = [evidence.records[run].result["provenance"] for run in done]
            parts = [part for origin in origins for part in origin.get("parts", [origin])]  # a run may go on elsewhere
            run, full = done[0], EXHIBITS[name].grid("paper")[0]
            images = f"{origins[0]['train_images']:,}" if run.train_size else "all"
            width = f", {run.width / full.width:g} of the width" if run.width != full.width else ""
            training = f"{run.epochs} of {full.epochs} epochs, {images} images{width}"
            seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in done}))
            time = duration(sum(origin["seconds"] for origin in origins))
            hardware = "; ".join(dict.fromkeys(f"{part['device']}, {part['precision']}" for part in parts))
            yield [EXHIBITS[name].title, profile, training, f"{len(done)} of {len(runs)}", seeds, time, hardware]


if __name__ == "__main__":
    main()
