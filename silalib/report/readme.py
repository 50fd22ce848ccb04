"""README's numbers and its picture, made from the committed records: python -m silalib.report.readme.

What is measured stands in README.md between two marks. It is written anew, and docs/images/measured.png with it; a
test makes both again. Profiles are never mixed, and what has no record says 'not run'.
"""

import io
import re
import sys

import pandas as pd

from ..analysis import claims, plots, statistics, tables
from ..errors import UserError
from ..experiments import EXHIBITS, PROFILES
from ..files import ROOT, write_atomically
from ..launch.progress import duration
from ..losses import LABELS
from ..records import find

README = ROOT / "README.md"

PICTURE = ROOT / "docs" / "images" / "measured.png"

MARKED = re.compile(r"(?<=<!-- measured -->\n).*(?=<!-- end -->)", re.DOTALL)

SHOWN = tuple(reversed(PROFILES[1:]))  # the data of quick are a stand-in

TABLES = {"table1": ("sila", "dml", "sila+dml"), "table2": ("sila", "dml", "sila+dml"), "table3": ("sila",)}
"""Table -> the methods that it compares with IND."""

FIGURES = {4: ("fig3", "fig3"), 5: ("fig5", "fig4"), 6: ("fig6",), 7: ("fig7",) * 4}
"""Number of a claim -> the exhibit of each of its effects."""


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


def compared(evidence, judged):
    """[(exhibit, `statistics.Effect`)] of what each table and figure compares, in the paper's order."""
    rows = []
    for name, methods in TABLES.items():
        frame = evidence.tables[evidence.tables["exhibit"] == name]
        for method in methods:
            title = f"top-1, {LABELS[method]} over IND"
            rows.append((name, tables.effect(title, "points", tables.gains(frame, method), evidence.records)))
    for number, names in FIGURES.items():
        rows += zip(names, judged[number - 1].effects)
    return sorted(rows, key=lambda row: list(EXHIBITS).index(row[0]))


def render(found):
    """(what stands between README's marks, the bytes of its picture) of profile -> `claims.Evidence`."""
    judged = {profile: claims.judge_all(evidence) for profile, evidence in found.items()}
    columns = {"the paper prints": compared(claims.printed(), claims.judge_all(claims.printed()))}
    columns |= {f"profile {profile}": compared(evidence, judged[profile]) for profile, evidence in found.items()}
    return in_words(found, judged, columns), picture(found, columns)


def in_words(found, judged, columns):
    """Markdown. columns: what stands above a column of the table -> what `compared` gives."""
    effects = []
    for (name, paper), *own in zip(*columns.values(), strict=True):
        row = [short_title(name), paper.named, in_cell(paper) or "-"]
        effects.append(row + [in_cell(effect) or "not run" for _, effect in own])
    verdicts = [[f"{c[0].number}. {c[0].claim}", *(own.verdict for own in c)] for c in zip(*judged.values())]
    trained_for = ["trained for", "profile", "training", "runs", "seeds", "time", "hardware"]
    table = lambda rows, header: plots.markdown(pd.DataFrame(rows, columns=header))
    parts = [
        "\n**Status.**\n",
        *(status(profile, evidence, judged[profile]) for profile, evidence in found.items()),
        "",
        table(effects, ["exhibit", "what is compared", *columns]),
        "IND: trained independently. DML: deep mutual learning. A number is a mean over networks, exits or rows of a"
        " table, with its 95% interval over seeds (one seed has none); positive supports the paper's claim. After it:"
        " how many cells go the claim's way, in a table those of all its metrics, and how many more the profile has."
        " A shortened protocol can show which way a difference goes, and not reach the paper's accuracies.\n",
        table(verdicts, ["the paper's claim", *list(columns)[1:]]),
        table(trainings(found), trained_for),
    ]
    return "\n".join(parts) + "\n"


def in_cell(effect):
    """An effect in a cell of the table, without its unit; "" without records."""
    seeds = statistics.seeds([effect.seeds], ", ") if effect.runs else ""  # the paper prints none
    return f"{effect.number}, {effect.cells}{seeds}" if effect.total else ""


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
    for name, methods in TABLES.items():
        paper, cells = tables.printed(name), tables.cells(evidence.grids[name], evidence.records, ("top1",), name)
        cells = cells[cells["value"].notna()]
        for row in tables.over_seeds(cells[cells["method"] == LABELS["ind"]]).head(1).to_dict("records"):
            own = statistics.plus_minus(row["mean"], row["half"])
            paper_own = f"{row['paper']:.2f}%"
            yield f"Trained alone, {row['network']} reaches {own}% top-1 on {row['dataset']}, in the paper {paper_own}."
        pairs = set(cells.loc[cells["method"] != LABELS["ind"], "pair"])
        if pairs and pairs < set(paper.loc[paper["method"] != "ind", "pair"]):
            same = paper[paper["pair"].isin(pairs) | (paper["method"] == "ind")]
            gains = [f"{tables.effect('', '', tables.gains(same, m)).mean:+.2f} ({LABELS[m]})" for m in methods]
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


def picture(found, columns):
    """The bytes of a PNG: Figure 6 with its first seed, and all gains in points with the paper's."""
    import matplotlib.pyplot as plt
    from PIL import Image

    plots.use_style()
    fig = plt.figure(figsize=(9.6, 7.6))
    above, below = fig.subfigures(2, 1, height_ratios=(1, 1.2))
    features(above, found)
    gains(below, columns)
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


def gains(fig, columns):
    """The gains in points of each column, with intervals; a row without any of ours says 'not run'."""
    ax = fig.subplots()
    colours = ("#777777", plots.COLOURS["dml"], plots.COLOURS["sila"], plots.COLOURS["sila+dml"])
    rows = [row for row in zip(*columns.values()) if row[0][1].unit == "points"]
    series = []
    for label, fmt, colour, column in zip(columns, "xosD", colours, zip(*rows)):
        means, half_widths = zip(*((effect.mean, effect.half_width) for _, effect in column))
        series.append((range(len(rows)), means, half_widths, dict(label=label, fmt=fmt, color=colour)))
    names = [f"{short_title(name)}: {effect.name}" for (name, effect), *_ in rows]
    plots.intervals(ax, names, series, "mean gain (percentage points)")
    for y, (_, *own) in enumerate(rows):
        if not any(effect.total for _, effect in own):
            ax.text(1.01, y, "not run", transform=ax.get_yaxis_transform(), fontsize=9, va="center")
    fig.legend(loc="outside lower center", ncols=len(columns))


if __name__ == "__main__":
    main()
