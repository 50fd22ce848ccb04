"""README's numbers and its picture, made from the committed records: python -m silalib.readme.

What is measured stands in README.md between two marks. It is written anew, and docs/images/measured.png with it; a
test makes both again. No profile fills another's cell, and what has no record says 'not run'.
"""

import io
import re
import sys

from . import claims, plots, summary
from .errors import UserError
from .experiments import EXHIBITS, PROFILES
from .losses import LABELS
from .paths import ROOT
from .progress import duration
from .runs import find, write_atomically

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
        text, image = render(collect())
        before = README.read_text(encoding="utf-8")
        if not MARKED.search(before):
            raise UserError(f"{README} has no place between <!-- measured --> and <!-- end -->")
        write_atomically(README, MARKED.sub(lambda _: text, before).encode())
        write_atomically(PICTURE, image)
    except UserError as error:
        sys.exit(f"silalib: {error}")


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
    """[(exhibit, `claims.Effect`)] of what each table and figure compares, in the paper's order."""
    rows = [(name, table_gain(evidence, name, method)) for name, methods in TABLES.items() for method in methods]
    rows += [row for number, names in FIGURES.items() for row in zip(names, judged[number - 1].effects)]
    return sorted(rows, key=lambda row: list(EXHIBITS).index(row[0]))


def table_gain(evidence, name, method):
    """A method over IND in one table: the mean gain in top-1, and the signs in all metrics."""
    better = claims.gains(evidence.tables[evidence.tables["exhibit"] == name], method, "ind")
    return claims.table_effect(f"top-1, {LABELS[method]} over IND", "points", better, evidence)


def render(found):
    """(what stands between README's marks, the bytes of its picture)"""
    judged = {profile: claims.judge_all(evidence) for profile, evidence in found.items()}
    printed = claims.printed()
    columns = {"the paper prints": compared(printed, claims.judge_all(printed))}
    columns |= {f"profile {profile}": compared(evidence, judged[profile]) for profile, evidence in found.items()}
    return in_words(found, judged, columns), picture(found, columns)


# The text


def in_words(found, judged, columns):
    """Markdown. columns: what stands above a column of the table -> what `compared` gives."""
    rows = []
    for (name, paper), *own in zip(*columns.values(), strict=True):
        row = [short_title(name), paper.named, in_cell(paper) or "-"]
        rows.append(row + [in_cell(effect) or "not run" for _, effect in own])
    names = list(columns)[1:]
    verdicts = [[f"{c[0].number}. {c[0].claim}", *(own.verdict for own in c)] for c in zip(*judged.values())]
    parts = [
        how_far(found, judged),
        table(["exhibit", "what is compared", *columns], rows),
        "IND: trained independently. DML: deep mutual learning. A number is a mean over networks, exits or rows of a"
        " table, with its 95% interval over seeds (one seed has none); positive speaks for the paper's claim. After it:"
        " how many cells go the claim's way, in a table those of all its metrics, and how many more the profile has.",
        *on_the_same_rows(found),
        "",
        table(["the paper's claim", *names], verdicts),
        table(["trained for", "profile", "training", "runs", "seeds", "time", "hardware"], trainings(found)),
    ]
    return "\n" + "\n".join(parts) + "\n"


def table(header, rows):
    import pandas as pd

    return plots.markdown(pd.DataFrame(rows, columns=header))


def in_cell(effect):
    """An effect in a cell of the table, without its unit; "" without records."""
    cells = summary.won_of(effect.won, effect.total, effect.missing)
    seeds = summary.seeds([effect.seeds], ", ") if effect.runs else ""  # the paper prints none
    return f"{effect.number}, {cells}{seeds}" if effect.total else ""


def how_far(found, judged):
    """How far we are, in words."""
    lines = ["**How far we are.**\n"]
    for profile, evidence in found.items():
        protocol = "the paper's own protocol" if profile == "paper" else "a shortened protocol"
        exhibits = ", ".join(short_title(name) for name in trained_for(evidence))
        score = claims.score(judged[profile]).removeprefix("claims: ")
        lines.append(
            f"- Profile {profile}, {protocol}: {len(evidence.records)} of {len(planned(evidence))} runs are trained, "
            f"for {exhibits}. Of the paper's claims: {score}."
        )
        lines += [f"  {sentence}" for sentence in alone(evidence)]
    records = {run: record for evidence in found.values() for run, record in evidence.records.items()}
    seconds = sum(record.result["provenance"]["seconds"] for record in records.values())
    lines.append(f"- These {len(records)} runs took {duration(seconds)} of training.")
    if len(found) > 1:
        lines[-1] += " A shortened protocol can show which way a difference goes, and not reach the paper's accuracies."
    return "\n".join(lines) + "\n"


def short_title(exhibit):
    return EXHIBITS[exhibit].title.split(":")[0]


def alone(evidence):
    """A sentence for each table: how close its first network, trained alone, comes to the paper's."""
    for name in TABLES:
        rows = summary.over_seeds(summary.cells(evidence.grids[name], evidence.records, ("top1",), name))
        for row in rows[(rows["method"] == LABELS["ind"]) & rows["mean"].notna()].to_dict("records")[:1]:
            yield (
                f"Trained alone, {row['network']} reaches {summary.plus_minus(row['mean'], row['half'])}% top-1 on "
                f"{row['dataset']}; the paper prints {row['paper']:.2f}%."
            )


def on_the_same_rows(found):
    """A sentence for each table of which a profile has some networks: what the paper prints for these."""
    for profile, evidence in found.items():
        for name, methods in TABLES.items():
            cells = summary.cells(evidence.grids[name], evidence.records, ("top1",), name)
            done, every = (
                {pair for pair in part["pair"] if "+" in pair}
                for part in (cells[cells["value"].notna()], summary.printed(name))
            )
            if done and done < every:
                own = cells[cells["pair"].isin(done)]
                gains = [f"{summary.score(own, m, 'paper_gain').mean:+.2f} ({LABELS[m]})" for m in methods]
                yield (
                    f"Of {short_title(name)}, profile {profile} has {', '.join(sorted(done))} alone, where the paper "
                    f"prints {', '.join(gains)}."
                )


def trained_for(evidence):
    """Exhibit -> the records of its runs that no exhibit before it has."""
    groups = {}
    for run, name in planned(evidence).items():
        if run in evidence.records:
            groups.setdefault(name, {})[run] = evidence.records[run]
    return groups


def trainings(found):
    """Rows of what was trained: for how long, with which seeds, on what."""
    rows = []
    for profile, evidence in found.items():
        grid = planned(evidence)
        for name, records in trained_for(evidence).items():
            run, full = next(iter(records)), EXHIBITS[name].grid("paper")[0]
            origins = [record.result["provenance"] for record in records.values()]
            parts = [part for origin in origins for part in origin.get("parts", [origin])]  # a run may go on elsewhere
            images = f"{origins[0]['train_images']:,}" if run.train_size else "all"
            width = f", {run.width / full.width:g} of the width" if run.width != full.width else ""
            rows.append(
                [
                    EXHIBITS[name].title,
                    profile,
                    f"{run.epochs} of {full.epochs} epochs, {images} images{width}",
                    f"{len(records)} of {list(grid.values()).count(name)}",
                    ", ".join(str(seed) for seed in sorted({r.seed for r in records})),
                    duration(sum(origin["seconds"] for origin in origins)),
                    "; ".join(dict.fromkeys(f"{part['device']}, {part['precision']}" for part in parts)),
                ]
            )
    return rows


# The picture


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
    networks = (("ind", 0, "IND"), ("sila", 0, "SiLa Net1"), ("sila", 1, "SiLa Net2"))
    for profile, evidence in found.items():
        records = {run.method: evidence.records[run] for run in evidence.grids["fig6"][:2] if run in evidence.records}
        if len(records) == 2:
            for ax, (method, head, label) in zip(fig.subplots(1, 3), networks):
                plots.features(ax, records[method], head, label)
            fig.suptitle(f"Figure 6: features of test images, profile {profile}", fontsize=11)
            return


def gains(fig, columns):
    """The gains in points of each column, with intervals; a row without any of ours says 'not run'."""
    ax = fig.subplots()
    colours = ("#777777", plots.COLOURS["dml"], plots.COLOURS["sila"], plots.COLOURS["sila+dml"])
    for i, (label, rows) in enumerate(columns.items()):
        points = [effect for _, effect in rows if effect.unit == "points"]
        y = [row + 0.2 * (i - (len(columns) - 1) / 2) for row in range(len(points))]
        means, halves = [effect.mean for effect in points], [effect.half for effect in points]
        if not any(effect.total for effect in points):
            continue  # no entry in the legend
        ax.errorbar(means, y, xerr=halves, fmt="xosD"[i], color=colours[i], label=label)
    rows = [row for row in zip(*columns.values()) if row[0][1].unit == "points"]
    for y, (_, *own) in enumerate(rows):
        if not any(effect.total for _, effect in own):
            ax.text(1.01, y, "not run", transform=ax.get_yaxis_transform(), fontsize=9, va="center")
    names = [f"{short_title(name)}: {effect.name}" for (name, effect), *_ in rows]
    ax.set_yticks(range(len(rows)), names)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.axvline(0, color="#333333", linewidth=1)
    ax.set_xlabel("mean gain (percentage points)")
    fig.legend(loc="outside lower center", ncols=len(columns))


if __name__ == "__main__":
    main()
