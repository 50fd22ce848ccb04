"""What the figures and tables of all notebooks share: style, colours, watermark, and saving what is shown."""

from importlib.resources import files

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from . import summary
from .losses import LABELS
from .paths import results_folder
from .runs import write_atomically

COLOURS = dict(zip(LABELS, ("#555555", "#0072b2", "#d55e00", "#009e73", "#cc79a7")))
"""Method -> colour, distinguishable without red-green vision."""


def use_style():
    plt.style.use(str(files("silalib") / "silalib.mplstyle"))


def gains(rows, methods, title):
    """A figure of `summary.over_seeds`: each network row's gain in top-1 over IND with its 95% interval, by method.

    A cross beside a point is the gain that the paper prints. The title is followed by the number of seeds.
    """
    top1 = rows[(rows["metric"] == "top1") & rows["method"].isin([LABELS[m] for m in methods])]
    names = list(dict.fromkeys(zip(top1["pair"], top1["net"])))
    fig, ax = plt.subplots(figsize=(7.6, 1.2 + (0.18 + 0.08 * len(methods)) * len(names)))
    for i, method in enumerate(methods):
        part = top1[top1["method"] == LABELS[method]]
        y = [names.index(key) + 0.2 * (i - (len(methods) - 1) / 2) for key in zip(part["pair"], part["net"])]
        ax.errorbar(part["gain"], y, xerr=part["gain_half"], fmt="o", color=COLOURS[method], label=LABELS[method])
        ax.plot(part["paper_gain"], y, "x", color=COLOURS[method], alpha=0.6)
    ax.plot([], [], "x", color="#777777", label="the paper's gain")
    ax.axvline(0, color="#333333", linewidth=1)
    ax.set_yticks(range(len(names)), [f"{pair}, Net{net}" for pair, net in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel("gain in top-1 over IND (percentage points)")
    ax.set_title(f"{title}{summary.seeds(top1['gain_n'], ', ')}", loc="right")
    fig.legend(loc="outside lower center", ncols=len(methods) + 1)
    return fig


def show(fig, name, profile, alt, measured=True):
    """Save a figure as results/<profile>/figures/<name>.png, display it with its alternative text, and close it.

    measured: whether it shows records. In the quick profile it is watermarked then: the data are a stand-in.
    Axes in which nothing is drawn say 'not run'; where all are, a line of text takes the figure's place.
    """
    import io

    from IPython.display import Image, Markdown, display

    if not anything_drawn(fig):
        plt.close(fig)
        display(Markdown("**Not run:** the records, or the data, that this figure shows are not on disk."))
        return
    if measured and profile == "quick":
        fig.text(
            0.5, 0.5, "stand-in data", fontsize=44, color="#000000", alpha=0.07, rotation=25, ha="center", va="center"
        )  # fmt: skip
    for ax in fig.axes:
        if ax.get_xlabel() == "epoch":  # there is no half of one
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", metadata={"Software": None}, bbox_inches="tight")
    plt.close(fig)
    folder = results_folder(profile) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.png", buffer.getvalue())
    width = plt.imread(io.BytesIO(buffer.getvalue())).shape[1]
    display(Image(buffer.getvalue(), width=round(width * 0.62), alt=alt, metadata={"alt": alt}))


def anything_drawn(fig):
    """Whether any axes of a figure have data. Those without get the words 'not run' for their ticks and grid."""
    empty = [ax for ax in fig.axes if not np.isfinite(ax.dataLim.get_points()).all()]
    for ax in empty:
        ax.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
        ax.grid(False)
        if not ax.texts:
            ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", va="center", color="#767676")
    return len(empty) < len(fig.axes)


def show_table(frame, name, profile, caption, data=None):
    """Display a data frame with a caption; save it, or the `data` behind it, as results/<profile>/tables/<name>.csv."""
    from IPython.display import HTML, display

    folder = results_folder(profile) / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    saved = frame if data is None else data
    write_atomically(folder / f"{name}.csv", saved.to_csv(index=False, lineterminator="\n").encode())
    display(HTML(frame.style.hide(axis="index").set_caption(caption).to_html()))
