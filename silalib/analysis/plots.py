"""What the figures and tables of all notebooks share: style, colours, watermark, and saving what is shown."""

import html
import io
import re
from importlib.resources import files
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from .. import __version__, data
from ..files import results_folder, to_json, write_atomically
from ..losses import LABELS
from . import statistics, tables

COLOURS = dict(zip(LABELS, cycle(("#555555", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"))))
"""Method -> colour, distinguishable without red-green vision."""


def use_style():
    plt.style.use(["default", str(files("silalib.analysis") / "silalib.mplstyle")])


def legend_below(fig, axes, ncols=2):
    """One legend below all panels, with each label once; none where nothing is drawn."""
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    if handles:
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols)


def gains(rows, methods, title):
    """A figure of `tables.over_seeds`: each network row's gain in top-1 over IND with its 95% interval, by method.

    A cross beside a point is the gain that the paper prints. The title is followed by the number of seeds.
    """
    top1 = rows[(rows["metric"] == "top1") & rows["method"].isin([LABELS[m] for m in methods])]
    names = list(dict.fromkeys(zip(top1["pair"], top1["net"])))
    fig, ax = plt.subplots(figsize=(7.6, 1.2 + (0.18 + 0.08 * len(methods)) * len(names)))
    series = []
    for method in methods:
        part = top1[top1["method"] == LABELS[method]]
        lines = [names.index(name) for name in zip(part["pair"], part["net"])]
        style = dict(label=LABELS[method], fmt="o", color=COLOURS[method])
        series.append((lines, part["gain"], part["gain_half"], style, part["paper_gain"]))
    xlabel = "gain in top-1 over IND (percentage points)"
    intervals(ax, [f"{pair}, Net{net}" for pair, net in names], series, xlabel)
    ax.plot([], [], "x", color="#777777", label="the paper's gain")
    ax.set_title(f"{title}{statistics.seeds(top1['gain_n'], ', ') or ', not run'}", loc="right")
    fig.legend(loc="outside lower center", ncols=len(methods) + 1)
    return fig


def intervals(ax, names, series, xlabel):
    """Draw means with their intervals beside names, from top to bottom, with a rule at zero.

    series: [(number of each point's name, means, half-widths, style, crosses)]; crosses can be left out. One without a
    mean is not in the legend.
    """
    for i, (lines, means, half_widths, style, *crosses) in enumerate(series):
        y = np.array(lines) + 0.2 * (i - (len(series) - 1) / 2)
        bars = ax.errorbar(means, y, xerr=half_widths, **style)
        if not np.isfinite(means).any():
            bars.set_label(None)
        for numbers in crosses:
            ax.plot(numbers, y, "x", color=style["color"], alpha=0.6)
    ax.axvline(0, color="#333333", linewidth=1)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(xlabel)


def features(ax, record, head, label):
    """Draw the two-dimensional features of a record's test images (Figure 6), coloured by class.

    The digit marks the mean of its class. label: what the network is called in the title.
    """
    points, labels = record.features[f"test_{head}"].astype(float), record.features["test_labels"]
    size = 2 if len(points) > 2000 else 9
    ax.scatter(*points.T, c=labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=size, alpha=0.5, linewidths=0)
    for digit in np.unique(labels):
        centre = points[labels == digit].mean(0)
        ax.annotate(
            str(digit), centre, ha="center", va="center", fontsize=9, weight="bold",
            bbox=dict(boxstyle="circle,pad=0.12", facecolor="white", edgecolor="#555555", linewidth=0.5),
        )  # fmt: skip
    metrics = record.heads[head]
    ratio = f"scatter ratio {metrics['test_concentration']:.4f}"
    ax.set_title(f"{label}, seed {record.run.seed}\ntop-1 {metrics['top1']:.2f}%, {ratio}", fontsize=10)
    ax.set(xticks=[], yticks=[])


def show(fig, name, profile, alt, records=()):
    """Save a figure as results/<profile>/figures/<name>.png, .svg and .pdf, display it, and close it.

    alt: its alternative text. records: those it shows, as `ensure` gives them; <name>.json says where they come from.
    A figure of records is watermarked in the quick profile: the data are a stand-in. Equal figures give equal bytes.
    Axes in which nothing is drawn say 'not run'; where all are, a line of text takes the figure's place.
    """
    from IPython.display import Image, Markdown, display

    if not anything_drawn(fig):
        plt.close(fig)
        display(Markdown("**Not run:** the records, or the data, that this figure shows are not on disk."))
        return
    if records and profile == "quick":
        fig.text(
            0.5, 0.5, "stand-in data", fontsize=44, color="#000000", alpha=0.07, rotation=25, ha="center", va="center"
        )  # fmt: skip
    for ax in fig.axes:
        if ax.get_xlabel() == "epoch":  # there is no half of one
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        for points in ax.collections:
            points.set_rasterized(len(points.get_offsets()) > 500)  # else each is an object of the SVG and the PDF
    contents = {}
    for kind, metadata in UNDATED.items():
        buffer = io.BytesIO()
        fig.savefig(buffer, format=kind, metadata=metadata, bbox_inches="tight")
        contents[kind] = buffer.getvalue()
        fig.set_layout_engine("none")  # it is laid out now: the other formats need not do it again
    shown = io.BytesIO()  # in WebP: half of the PNG's bytes or fewer
    fig.savefig(shown, format="webp", bbox_inches="tight", pil_kwargs={"lossless": True})
    plt.close(fig)
    save("figures", name, profile, contents, records)
    width = plt.imread(shown, "webp").shape[1]
    display(Image(shown.getvalue(), width=round(width * 0.62), alt=alt, metadata={"alt": alt}))


def anything_drawn(fig):
    """Whether any axes of a figure have data. Those without get the words 'not run' for their ticks and grid."""
    empty = [ax for ax in fig.axes if not np.isfinite(ax.dataLim.get_points()).all()]
    for ax in empty:
        ax.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
        ax.grid(False)
        if not ax.texts:
            ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", va="center", color="#767676")
    return len(empty) < len(fig.axes)


UNDATED = {
    "png": {"Software": None},
    "svg": {"Creator": None, "Date": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}
"""Format of a figure -> the metadata that must not be in it, for its bytes to be the same every time."""


def show_table(frame, name, profile, caption, data=None, records=()):
    """Display a data frame with a caption; save it as results/<profile>/tables/<name>.csv, .md and .tex.

    data: what the CSV file has instead, the numbers behind a table of text. records: as in `show`.
    """
    from IPython.display import HTML, display

    contents = {
        "csv": (frame if data is None else data).to_csv(index=False, lineterminator="\n").encode(),
        "md": f"{in_markdown(caption)}\n\n{markdown(frame)}".encode(),
        "tex": latex(frame, caption).encode(),
    }
    save("tables", name, profile, contents, records)
    # JupyterLab sets everything to the right, which is for numbers
    words = [name for name in frame if frame[name].astype(str).str.contains("[A-Za-z]{2}").any()]
    left = {name: [{"selector": "", "props": "text-align: left"}] for name in words}
    style = escaped(frame, "html").set_caption(html.escape(caption)).set_uuid(name).set_table_styles(left)
    display(HTML(style.to_html()))


def save(kind, name, profile, contents, records):
    """Write results/<profile>/<kind>/<name>.*: contents by suffix, and a JSON file of the records that are shown."""
    folder = results_folder(profile) / kind
    folder.mkdir(parents=True, exist_ok=True)
    runs = [{"key": run.key, **records[run].result["provenance"]} for run in records]
    seeds = sorted({run.seed for run in records})
    origin = {"silalib": __version__, "profile": profile, "seeds": seeds, "runs": runs}
    for suffix, content in (contents | {"json": to_json(origin)}).items():
        write_atomically(folder / f"{name}.{suffix}", content)


def markdown(frame):
    """A data frame as a Markdown table."""
    header = [" ".join(filter(None, name)) if isinstance(name, tuple) else name for name in frame.columns]
    rows = [map(in_markdown, row) for row in [header, *frame.itertuples(index=False)]]
    rows.insert(1, ["---"] * len(header))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def in_markdown(value):
    return re.sub(r"([\\`*_<|~$])", r"\\\1", str(value))


def latex(frame, caption):
    """A data frame as a LaTeX table, for a document with the package booktabs and T1 fonts."""
    caption = re.sub(r"([&%$#_{}])", r"\\\1", caption)
    style = escaped(frame, "latex")
    return style.to_latex(caption=caption, position_float="centering", hrules=True, multicol_align="c")


def escaped(frame, language):
    """The style of a data frame without its index; every character of cells and headers stands for itself."""
    style = frame.style.hide(axis="index").format(escape=language)
    return style.format_index(escape=language, axis="columns")


def table_page(name, profile, grid, records):
    """Show "table1", "table2" or "table3" beside the paper's, data set by data set, and the gains in top-1 over IND."""
    methods = [method for method in LABELS if method != "ind" and method in {run.method for run in grid}]
    for dataset in dict.fromkeys(run.dataset for run in grid):
        own = [run for run in grid if run.dataset == dataset]
        done = {run: records[run] for run in own if run in records}
        parts, suffix = {"a": ("top1", "top5"), "b": ("best", "nll")}, ""
        if name == "table3":
            suffix = f"_{dataset}"
            parts = {suffix: ("top1", "top2" if data.dataset(dataset).classes == 10 else "top5")}
        metrics = [metric for part in parts.values() for metric in part]
        rows, where = tables.over_seeds(tables.cells(own, done, metrics, name)), tables.title(profile, dataset)
        over = statistics.seeds(rows["n"], "; mean ± 95% interval over ") or "; not run"
        for part, shown in parts.items():
            frame = tables.comparison(rows, shown, learned=80 if profile == "quick" else 0)
            caption = f"Table {name[-1]}{part if not suffix else ''}. {where}; {tables.unit(shown)}{over}."
            show_table(frame, f"{name}{part}", profile, caption, rows[rows["metric"].isin(shown)], done)
        fig = gains(rows, methods, where)
        alt = "Gain in top-1 accuracy over independent training for every network row"
        show(fig, f"{name}{suffix}_gains", profile, alt, done)


def panels(names, columns, title):
    """A figure of means with their intervals, in panels that share the names of their rows.

    columns: label of a panel -> [(mean, half-width) of each row].
    """
    fig, axes = plt.subplots(1, len(columns), figsize=(2.2 + 2.9 * len(columns), 1.3 + 0.34 * len(names)), sharey=True)
    for ax, (label, values) in zip(np.atleast_1d(axes), columns.items()):
        means, half_widths = np.array(values, float).reshape(-1, 2).T
        style = dict(fmt="o", color=COLOURS["sila"], capsize=2)
        intervals(ax, names, [(range(len(names)), means, half_widths, style)], label)
        ax.locator_params(axis="x", nbins=5)
    fig.suptitle(title, x=0.01, ha="left", fontsize=11)
    return fig
