"""What the figures and tables of all notebooks share: style, colours, watermark, and saving what is shown."""

import html
import io
import re
from importlib.resources import files
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex, to_rgb
from matplotlib.ticker import MaxNLocator

from .. import __version__, data
from ..files import results_folder, to_json, write_atomically
from ..losses import LABELS
from . import statistics, tables

COLOURS = dict(zip(LABELS, cycle(("#555555", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"))))
"""Method -> colour, distinguishable without red-green vision."""
INK, FAINT = "#1c1e21", "#767676"
PAPER = dict(marker="D", linestyle="", color=INK, fillstyle="none", markersize=9, zorder=4)
"""The mark of the paper's numbers: an open diamond, larger than our points and above them."""
UNDATED = dict(png={"Software": None}, svg=dict.fromkeys(("Creator", "Date")))
UNDATED["pdf"] = dict.fromkeys(("Creator", "Producer", "CreationDate"))
"""Format of a figure -> the metadata that must not be in it, for its bytes to be the same every time."""


def use_style():
    plt.style.use(["default", str(files("silalib.analysis") / "silalib.mplstyle")])


def label_lines(ax):
    """Name each line at its right end in its colour, in the place of a legend; no name covers another."""
    bottom, top = ax.get_ylim()
    lines = sorted((line for line in ax.lines if line.get_label()[0] != "_"), key=lambda line: line.get_ydata()[-1])
    ends = np.array([(line.get_ydata()[-1] - bottom) / (top - bottom) for line in lines])
    apart = 0.08 * max((1 + line.get_label().count("\n") for line in lines), default=0) * np.arange(len(lines))
    places = np.minimum(np.maximum.accumulate(ends - apart) + apart, 1 - apart[::-1])
    for line, y in zip(lines, places):
        ax.text(1.02, y, line.get_label(), transform=ax.transAxes, va="center", color=line.get_color(), fontsize=10)


def difference(ax, x, values, colour=COLOURS["sila"], label="", fmt="-"):
    """Draw differences, shape (seeds, points), as their mean with one band, its 95% interval over seeds."""
    ax.axhline(0, color=INK, linewidth=1)
    if np.size(values):
        mean, half = np.array([statistics.interval(column) for column in np.asarray(values, float).T]).T
        ax.plot(x, mean, fmt, color=colour, label=label)
        ax.fill_between(x, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)


def gains(rows, methods, title):
    """A figure of `tables.over_seeds`: each network row's gain in top-1 over IND with its 95% interval, by method, and
    as a diamond the paper's. Rows without a gain of ours are left out. The number of seeds follows the title."""
    top1 = rows[(rows["metric"] == "top1") & rows["gain"].notna() & rows["method"].isin(map(LABELS.get, methods))]
    top1 = top1.assign(line=top1.groupby(["pair", "net"], sort=False).ngroup())
    series = []
    for method in methods:
        part, style = top1[top1["method"] == LABELS[method]], dict(label=LABELS[method], fmt="o", color=COLOURS[method])
        series.append((part["line"], part["gain"], part["gain_half"], style, part["paper_gain"]))
    networks = top1.drop_duplicates("line")
    names = [f"{tables.short(pair)} · Net{net}" for pair, net in zip(networks["pair"], networks["net"])]
    fig, ax = plt.subplots(figsize=(5.6, 1.4 + (0.18 + 0.1 * len(methods)) * len(names)))
    intervals(ax, names, series, "gain in top-1 over IND (points)")
    ax.plot([], [], **PAPER, label="the paper's gain")
    ax.set_title(f"{title}{statistics.seeds(top1['gain_n'], ', ')}")
    fig.legend(loc="outside lower center", ncols=min(len(methods) + 1, 3))
    return fig


def intervals(ax, names, series, xlabel):
    """Draw means with their intervals beside names, from top to bottom, with a rule at zero. series: [(number of each
    point's name, means, half-widths, style, the paper's numbers or none)]; one without a mean has no legend."""
    for i, (lines, means, half_widths, style, *papers) in enumerate(series):
        y = np.array(lines) + 0.2 * (i - (len(series) - 1) / 2)
        bars = ax.errorbar(means, y, xerr=half_widths, **style)
        if not np.isfinite(means).any():
            bars.set_label(None)
        for numbers in papers:
            ax.plot(numbers, y, **PAPER)
    ax.axvline(0, color=INK, linewidth=1)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(max(len(names), 1) - 0.5, -0.5)
    ax.set_xlabel(xlabel)


def features(ax, record, head, label):
    """Draw the two-dimensional features of a record's test images (Figure 6), coloured by class; a digit marks the mean
    of its class. label: what the network is called in the title."""
    points, labels = record.features[f"test_{head}"].astype(float), record.features["test_labels"]
    size = 2 if len(points) > 2000 else 9
    ax.scatter(*points.T, c=labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=size, alpha=0.5, linewidths=0)
    box = dict(boxstyle="circle,pad=0.12", facecolor="white", edgecolor="#555555", linewidth=0.5)
    for digit in np.unique(labels):
        centre = points[labels == digit].mean(0)
        ax.annotate(str(digit), centre, ha="center", va="center", fontsize=9, weight="bold", bbox=box)
    metrics = record.heads[head]
    words = f"top-1 {metrics['top1']:.2f}%, scatter ratio {metrics['test_concentration']:.4f}"
    ax.set_title(f"{label}, seed {record.run.seed}\n{words}", fontsize=10)
    ax.set(xticks=[], yticks=[])


def show(fig, name, profile, alt, records=(), thumb=None):
    """Save a figure as results/<profile>/figures/<name>.png, .svg, .pdf and .csv, display it, and close it.

    alt: its alternative text. records: those it shows, as `ensure` gives them; <name>.json says where they come from,
    and in the quick profile they are watermarked. thumb: the panel that the index shows, of a page's main figure.
    Equal figures give equal bytes. Where nothing is drawn, a line of text takes its place.
    """
    from IPython.display import Image, Markdown, display

    if not anything_drawn(fig):
        plt.close(fig)
        display(Markdown("**Not run:** the records, or the data, that this figure shows are not on disk."))
        return
    if records and profile == "quick":
        fig.text(0.5, 0.5, "stand-in data", fontsize=36, color=FAINT, alpha=0.15, rotation=25, ha="center", va="center")
    for ax in fig.axes:
        if ax.get_xlabel() == "epoch":  # there is no half of one
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        for points in ax.collections:
            points.set_rasterized(len(points.get_offsets()) > 500)  # else each is an object of the SVG and the PDF
    contents = {"csv": numbers(fig).to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()}
    for kind in UNDATED:
        contents[kind] = in_format(fig, kind)
        fig.set_layout_engine("none")  # it is laid out now: the other formats need not do it again
    contents["svg"] = themed(contents["svg"].decode(), name, alt).encode()
    metadata = {"alt": alt, "name": name, "title": fig.get_suptitle(), "panels": panel_boxes(fig)}
    if thumb is not None:
        metadata["thumbnail"] = thumbnail(fig, fig.axes[thumb], name)
    plt.close(fig)
    save("figures", name, profile, contents, records)
    display(Image(contents["png"], retina=True, alt=alt, metadata=metadata))


def in_format(fig, kind):
    """The bytes of a figure as "png", "svg" or "pdf"."""
    buffer, svg = io.BytesIO(), kind == "svg"
    dpi = 90 if svg else plt.rcParams["savefig.dpi"]  # of the clouds of points, which are most of an SVG's bytes
    fig.savefig(buffer, format=kind, dpi=dpi, metadata=UNDATED[kind], transparent=svg, bbox_inches="tight")
    return buffer.getvalue()


def having(records, name):
    """The records that have a file, and a line on those that have not: a wheel leaves out what is large."""
    from IPython.display import Markdown, display

    kept = {run: record for run, record in records.items() if record.has(name)}
    if lacking := len(records) - len(kept):
        display(Markdown(f"**Not shown** of {lacking} runs: {name} of their records is not here. A checkout has it."))
    return kept


def anything_drawn(fig):
    """Whether any axes of a figure have data. Those without become the words 'not run'."""
    empty = [ax for ax in fig.axes if not np.isfinite(ax.dataLim.get_points()).all()]
    for ax in empty:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", va="center", color=FAINT)
    return len(empty) < len(fig.axes)


def numbers(fig):
    """What the lines, bars and bands of a figure are drawn from: panel, series, x, y; clouds are in the records."""
    rows = []
    for ax in fig.axes:
        named = {bars[0]: bars.get_label() for bars in ax.containers}
        drawn = {line: line.get_xydata() for line in ax.lines}
        bands = [part for part in ax.collections if len(part.get_offsets()) < 2 and part.get_paths()]
        drawn |= {part: np.concatenate([path.vertices for path in part.get_paths()]) for part in bands}
        for artist, points in drawn.items():
            series = re.sub("^_.*", "", named.get(artist, artist.get_label()))
            rows += [(ax.get_title(loc="left"), ax.get_ylabel(), series, *point) for point in points]
    return pd.DataFrame(rows, columns=["panel", "quantity", "series", "x", "y"])


def themed(svg, name, alt):
    """An SVG of matplotlib in fewer bytes, whose colours follow the reader's light or dark theme; alone it is light. On
    a dark ground a grey is turned, and any other colour is lighter."""
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-zA-Z.]+(?:2d)?_\d+"', "", svg)  # nothing refers to them
    svg = re.sub(r'( id="|href="#|url\(#)(?:DejaVuSans-)?', rf"\g<1>{name}-", svg)  # a page has several figures
    svg = svg.replace("<g>", f'<g id="figure-{name}">', 1)
    svg = re.sub(r"\s+", " ", svg).replace("> <", "><")
    rules = "svg{fill:#e3e5e8}"  # of text in black, which has no style
    for kind, colour in sorted(set(re.findall(r"(fill|stroke): (#\w{6})", svg))):
        rgb = np.array(to_rgb(colour))
        dark = to_hex(0.95 - 0.85 * rgb if np.ptp(rgb) < 0.1 else rgb + 0.35 * (1 - rgb))
        rules += f'[style*="{kind}: {colour}"]{{{kind}:{dark}!important}}'
    svg = svg.replace("</style>", f"@media screen and (prefers-color-scheme:dark){{{rules}}}</style>", 1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)


def panel_boxes(fig):
    """The box (x, y, width, height) of each panel in the figure's SVG, for a phone to stack; none for one panel."""
    renderer, dpi = fig.canvas.get_renderer(), fig.dpi
    whole = fig.get_tightbbox(renderer).padded(plt.rcParams["savefig.pad_inches"])  # in inches
    boxes = [ax.get_tightbbox(renderer).padded(4) for ax in fig.axes if len(fig.axes) > 1]
    boxes = [(box.x0 - dpi * whole.x0, dpi * whole.y1 - box.y1, box.width, box.height) for box in boxes]
    return np.round(np.multiply(boxes, 72 / dpi), 1).tolist()


def thumbnail(fig, panel, name):
    """One panel of a figure without words, as a small SVG; the figure is used up."""
    for part in [*fig.legends, *fig.texts, *panel.texts, *(ax for ax in fig.axes if ax is not panel)]:
        part.remove()
    fig.set_size_inches(2.9, 1.9)
    panel.set(position=(0.03, 0.05, 0.94, 0.9), title="", xlabel="", ylabel="", xticklabels=[], yticklabels=[])
    return themed(in_format(fig, "svg").decode(), f"{name}-thumbnail", "")


def show_table(frame, name, profile, caption, data=None, records=()):
    """Display a data frame with a caption; save it as results/<profile>/tables/<name>.csv, .md and .tex.

    A column of nothing but "not run" is in the CSV file alone; where no other is left, a sentence says so.
    data: what the CSV file has instead, the numbers behind a table of text. records: as in `show`.
    """
    from IPython.display import HTML, Markdown, display

    whole, empty = frame, {"not run", "", "-"}
    frame = frame.loc[:, [not set(map(str, frame[name])) <= ({"0"} if name == "seeds" else empty) for name in frame]]
    values = (whole if data is None else data).to_csv(index=False, lineterminator="\n")
    contents = {"csv": values, "md": f"{in_markdown(caption)}\n\n{markdown(frame)}", "tex": latex(frame, caption)}
    save("tables", name, profile, {kind: text.encode() for kind, text in contents.items()}, records)
    if frame.shape[1] < min(2, whole.shape[1]):
        display(Markdown(f"**Not run:** {in_markdown(caption)}"))
        return
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


def in_markdown(value, special=r"[\\`*_<|~$]"):
    """A text with a backslash before each special character, but for those of $math$."""
    return re.sub(rf"(\$[^$]+\$)|({special})", lambda found: found[1] or "\\" + found[2], str(value))


def latex(frame, caption):
    """A data frame as a LaTeX table, for a document with the package booktabs and T1 fonts."""
    options = dict(caption=in_markdown(caption, "[&%$#_{}]"), position_float="centering", multicol_align="c")
    return escaped(frame, "latex-math").to_latex(**options, hrules=True)


def escaped(frame, language):
    """The style of a data frame without its index; every character of cells and headers stands for itself."""
    return frame.style.hide(axis="index").format(escape=language).format_index(escape=language, axis="columns")


def table_page(name, profile, grid, records):
    """Show "table1", "table2" or "table3" beside the paper's, data set by data set, and the gains in top-1 over IND."""
    methods = [method for method in LABELS if method != "ind" and method in {run.method for run in grid}]
    alt = "Gain in top-1 accuracy over independent training for every network row, beside the paper's"
    for dataset in dict.fromkeys(run.dataset for run in grid):
        own = [run for run in grid if run.dataset == dataset]
        done = {run: records[run] for run in own if run in records}
        parts, suffix = {"a": ("top1", "top5"), "b": ("best", "nll")}, ""
        if name == "table3":
            parts, suffix = {"": ("top1", "top2" if data.dataset(dataset).classes == 10 else "top5")}, f"_{dataset}"
        rows = tables.over_seeds(own, done, [metric for part in parts.values() for metric in part], name)
        where = tables.title(profile, dataset)
        over = statistics.seeds(rows["n"], "; mean ± 95% interval over ") or "; not run"
        show(gains(rows, methods, f"Table {name[-1]}. {where}"), f"{name}{suffix}_gains", profile, alt, done, thumb=0)
        for part, shown in parts.items():
            frame = tables.comparison(rows, shown, learned=80 if profile == "quick" else 0)
            units = ", ".join(f"{tables.METRICS[m]} in {'nats' if m == 'nll' else 'percent'}" for m in shown)
            caption = f"Table {name[-1]}{part}. {where}; {units}{over}."
            show_table(frame, f"{name}{part}{suffix}", profile, caption, rows[rows["metric"].isin(shown)], done)


def panels(names, columns, title):
    """A figure of panels with the same rows, means with their intervals; rows without any are left out. columns: label
    of a panel -> [(mean, half-width) of each row]."""
    values = np.array(list(columns.values()), float).reshape(len(columns), -1, 2)
    drawn = np.isfinite(values[..., 0]).any(axis=0)
    names, rows = [name for name, found in zip(names, drawn) if found], -(-len(columns) // 2)
    fig, axes = plt.subplots(rows, 2, figsize=(10.4, rows * (1.1 + 0.3 * len(names))), squeeze=False)
    for ax, label, (means, half_widths) in zip(axes.flat, columns, values[:, drawn].transpose(0, 2, 1)):
        style = dict(fmt="o", color=COLOURS["sila"], capsize=2)
        intervals(ax, names, [(range(len(names)), means, half_widths, style)], label)
        ax.locator_params(axis="x", nbins=5)
    for ax in axes.flat[len(columns) :]:
        ax.remove()
    fig.suptitle(title, x=0.01, ha="left", fontsize=11)
    return fig
