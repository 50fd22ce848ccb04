"""What stands on a git host, made from the committed records: python -m silalib.report.readme.

README.md between its marks, docs/images/answer.svg and results/answer.json have the answer; results/README.md has
every verdict, what was trained, and the main figures and tables beside the records. A test makes all of it again.
"""

import re
import sys

from ..analysis import answer, status
from ..analysis.statistics import seeds
from ..errors import UserError
from ..experiments import EXHIBITS
from ..files import ROOT, to_json, write_atomically
from ..launch.progress import duration
from ..records import find
from .notebooks import CONTENTS
from .pages import template

MARKED = re.compile(r"(?<=<!-- measured -->\n).*(?=<!-- end -->)", re.DOTALL)
PICTURE = "docs/images/answer.svg"


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
    whole, before = answer.answer(found), (root / "README.md").read_text(encoding="utf-8")
    if not MARKED.search(before):
        raise UserError("README.md has no place between <!-- measured --> and <!-- end -->")
    results = template("results.md").render(
        answer=answer.in_markdown(whole, f"../{PICTURE}"), root=root, seeds=seeds,
        verdicts=[(profile, list(judged.values())) for profile, judged in whole.judged.items()],
        trainings=trainings(found), exhibits=exhibits(found),
    )  # fmt: skip
    kept = status.keep(whole)
    return {
        "README.md": MARKED.sub(lambda _: f"\n{answer.in_markdown(whole, PICTURE)}\n", before).encode(),
        "results/README.md": results.encode(),
        "results/answer.json": to_json(kept),
        PICTURE: kept["picture"].encode(),
    }


def planned(evidence):
    """Every run of the grids -> the first exhibit that has it."""
    return {run: name for name, grid in reversed(evidence.grids.items()) for run in grid}


def exhibits(found):
    """(profile, exhibit, its main figure, its table) of each that has records, of its own or those it is made for."""
    for profile, evidence in found.items():
        shared = {run for name in ("fig6", "fig7") for run in evidence.grids[name]}  # others add runs to these
        for name, (figure, table) in CONTENTS["main"].items():
            own = set(evidence.grids[name])
            if evidence.records.keys() & (own - shared if own > shared & own and name != "table1" else own):
                yield profile, EXHIBITS[name], figure, table


def trainings(found):
    """Rows of what was trained: for how long, with which seeds, on what."""
    for profile, evidence in found.items():
        first = planned(evidence)
        for name in EXHIBITS:
            runs = [run for run in first if first[run] == name]
            if not (done := [run for run in runs if run in evidence.records]):
                continue
            origins = [evidence.records[run].result["provenance"] for run in done]
            parts = [part for origin in origins for part in origin.get("parts", [origin])]  # a run may go on elsewhere
            run, full = done[0], EXHIBITS[name].grid("paper")[0]
            images = f"{origins[0]['train_images']:,}" if run.train_size else "all"
            width = f", {run.width / full.width:g} of the width" if run.width != full.width else ""
            training = f"{run.epochs} of {full.epochs} epochs, {images} images{width}"
            trained = ", ".join(map(str, sorted({run.seed for run in done})))
            time = duration(sum(origin["seconds"] for origin in origins))
            hardware = "; ".join(dict.fromkeys(f"{part['device']}, {part['precision']}" for part in parts))
            yield [EXHIBITS[name].title, profile, training, f"{len(done)} of {len(runs)}", trained, time, hardware]


if __name__ == "__main__":
    main()
