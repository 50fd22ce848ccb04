"""README's numbers and its picture, made from the committed records: python -m silalib.report.readme.

What is measured stands in README.md between two marks. It is written anew, and docs/images/measured.png with it; a
test makes both again. Profiles are never mixed, and what has no record says 'not run'.
"""

import io
import re
import sys

import numpy as np
import pandas as pd

from ..analysis import claims, plots, statistics, tables
from ..errors import UserError
from ..experiments import EXHIBITS, PROFILES
from ..files import ROOT, write_atomically
from ..launch.progress import duration
from ..losses import LABELS, PAPER_METHODS
from ..records import find

README = ROOT / "README.md"

PICTURE = ROOT / "docs" / "images" / "measured.png"

MARKED = re.compile(r"(?<=<!-- measured -->\n).*(?=<!-- end -->)", re.DOTALL)

SHOWN = tuple(reversed(PROFILES[1:]))  # the data of quick are a stand-in


def main():
    try:
        write(*render(collect()))
    except UserError as error:
        sys.exit(f"silalib: {error}")


def write(text, image, readme=README, picture=PICTURE):
    """Put the text between README's marks, and the picture beside it. Raises UserError where there are none."""
    before = readme.read_text(encoding="utf-8")
    if not MARKED.search(before):
        raise UserError(f"{readme} has no place between <!-- measured --> and <!-- end -->")
    write_atomically(readme, MARKED.sub(lambda _: text, before).encode())
    write_atomically(picture, image)


def collect():
    """Profile -> its `claims.Evidence`, of those with records. Raises UserError where a record cannot be read."""
    found = {profile: claims.collect(profile) for profile in SHOWN}
    for evidence in found.values():
        for run in planned(evidence):
            if run not in evidence.records and (folder := find(run)):
                raise UserError(f"{folder} has no whole record: README is made from whole ones alone")
    return {profile: evidence for profile, evidence in found.items() if evidence.records}


def planned(evidence):
    """Every run of the grids -> the first exhibit that has it."""
    first = {}
    for name, grid in evidence.grids.items():
        first |= {run: name for run in grid if run not in first}
    return first


def render(found):
    """(what stands between README's marks, the bytes of its picture) of profile -> `claims.Evidence`."""
    judged = {profile: claims.judge_all(evidence) for profile, evidence in found.items()}
    return in_words(found, judged), picture(found, judged)


def in_words(found, judged):
    """Markdown: what each profile says of the claims, and what it was trained for."""
    parts = ["\n**Status.**\n"]
    for profile, evidence in found.items():
        rows = [row for claim in judged[profile] for row in of_claim(claim)]
        header = ["claim", "what is compared", "the paper prints", "measured", "verdict"]
        waiting = [f"{claim.name}. {claim.claim}" for claim in judged[profile] if claim.verdict == "not run"]
        parts += [status(profile, evidence, judged[profile]), "", plots.markdown(pd.DataFrame(rows, columns=header))]
        parts += [f"Profile {profile} has no records yet for: {'; '.join(waiting)}.\n"] if waiting else []
    parts.append(
        "IND: trained independently. DML: deep mutual learning. A number is a mean over networks, exits or costs, with"
        " its 95% interval over seeds; positive supports the claim. A and B are questions of our own, not the paper's."
        " [The protocol](docs/protocol.md#what-is-judged) says what is judged, and by which rule; it came before the"
        " records. A shortened protocol can show which way a difference goes, and not reach the paper's accuracies.\n"
    )
    trained_for = ["trained for", "profile", "training", "runs", "seeds", "time", "hardware"]
    parts.append(plots.markdown(pd.DataFrame(trainings(found), columns=trained_for)))
    return "\n".join(parts) + "\n"


def of_claim(claim):
    """Rows of a claim's primary effects that have records."""
    for effect in claim.primary:
        if effect.runs or effect.exact:
            paper = "-" if np.isnan(effect.paper) else f"{effect.paper:+.2f}"
            seeds = statistics.seeds([effect.seeds], ", ")
            verdict = f"{effect.verdict}{f' ({effect.remark})' if effect.remark else ''}"
            yield [f"{claim.name}. {claim.claim}", effect.name, paper, f"{effect}{seeds}", verdict]


def short_title(exhibit):
    return EXHIBITS[exhibit].title.split(":")[0]


def status(profile, evidence, judged):
    """How far a profile is, in words, and how its tables compare with the paper's."""
    protocol = "the paper's own protocol" if profile == "paper" else "a shortened protocol"
    trained = dict.fromkeys(short_title(name) for run, name in planned(evidence).items() if run in evidence.records)
    seconds = sum(record.result["provenance"]["seconds"] for record in evidence.records.values())
    sentences = [
        f"- Profile {profile}, {protocol}: {len(evidence.records)} of {len(planned(evidence))} runs are trained, in "
        f"{duration(seconds)}, for {', '.join(trained)}.",
        f"Of the paper's claims: {claims.score(judged).removeprefix('claims: ')}.",
        *beside_the_paper(evidence),
    ]
    return "\n  ".join(sentences)


def beside_the_paper(evidence):
    """Sentences on each table: how close its first network comes to the paper's when it is trained alone, and what the
    paper prints for the pairs of a profile that does not have all of them."""
    for name in claims.TABLES:
        paper, cells = tables.printed(name), tables.cells(evidence.grids[name], evidence.records, ("top1",), name)
        cells = cells[cells["value"].notna()]
        for row in tables.over_seeds(cells[cells["method"] == LABELS["ind"]]).head(1).to_dict("records"):
            own = statistics.plus_minus(row["mean"], row["half"])
            paper_own = f"{row['paper']:.2f}%"
            yield f"Trained alone, {row['network']} reaches {own}% top-1 on {row['dataset']}, in the paper {paper_own}."
        pairs = set(cells.loc[cells["method"] != LABELS["ind"], "pair"])
        if pairs and pairs < set(paper.loc[paper["method"] != "ind", "pair"]):
            same = paper[paper["pair"].isin(pairs) | (paper["method"] == "ind")]
            better = {m: tables.gains(same[same["metric"] == "top1"], m)["gain"].mean() for m in PAPER_METHODS[1:]}
            gains = [f"{gain:+.2f} ({LABELS[m]})" for m, gain in better.items() if not np.isnan(gain)]
            where = f"{', '.join(sorted(pairs))} alone, where the paper prints {', '.join(gains)}"
            yield f"Of {short_title(name)} it has {where}."


def trainings(found):
    """Rows of what was trained: for how long, with which seeds, on what."""
    for profile, evidence in found.items():
        first = planned(evidence)
        for name in dict.fromkeys(name for run, name in first.items() if run in evidence.records):
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


def picture(found, judged):
    """The bytes of a PNG: Figure 6 with its first seed, and all gains in points with the paper's."""
    import matplotlib.pyplot as plt
    from PIL import Image

    plots.use_style()
    fig = plt.figure(figsize=(9.6, 7.6))
    above, below = fig.subfigures(2, 1, height_ratios=(1, 1.2))
    features(above, found)
    gains(below, judged)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=120)
    plt.close(fig)
    image = Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def features(fig, found):
    """Figure 6 with its first seed, of the first profile that has it."""
    for profile, evidence in found.items():
        records = {run.method: evidence.records[run] for run in evidence.grids["fig6"][:2] if run in evidence.records}
        if len(records) == 2:
            networks = (("ind", 0, "IND"), ("sila", 0, "SiLa Net1"), ("sila", 1, "SiLa Net2"))
            for ax, (method, head, label) in zip(fig.subplots(1, 3), networks):
                plots.features(ax, records[method], head, label)
            fig.suptitle(f"Figure 6: features of test images, profile {profile}", fontsize=11)
            return


def gains(fig, judged):
    """The primary effects in points that have records, with intervals, and the paper's own."""
    ax, rows = fig.subplots(), []
    for profile, verdicts in judged.items():
        effects = {effect.name: effect for claim in verdicts for effect in claim.primary}
        rows += [(profile, e) for e in effects.values() if e.unit == "points" and e.runs]
    colours = dict(zip(judged, (plots.COLOURS["sila"], plots.COLOURS["dml"], plots.COLOURS["sila+dml"])))
    series = []
    for profile, colour in colours.items():
        own = [(y, effect) for y, (where, effect) in enumerate(rows) if where == profile]
        means, half_widths = [effect.mean for _, effect in own], [effect.half_width for _, effect in own]
        style = dict(label=f"profile {profile}", fmt="o", color=colour)
        series.append(([y for y, _ in own], means, half_widths, style))
    paper = [effect.paper for _, effect in rows]
    series.append((range(len(rows)), paper, [np.nan] * len(rows), dict(label="the paper", fmt="x", color="#777777")))
    plots.intervals(ax, [effect.name for _, effect in rows], series, "mean gain (percentage points)")
    fig.legend(loc="outside lower center", ncols=len(series))


if __name__ == "__main__":
    main()
