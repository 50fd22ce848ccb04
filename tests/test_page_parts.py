"""What several pages share: the runs in words, a claim on one exhibit's page, rows side by side, tables and panels."""

import numpy as np
import pandas as pd
import pytest

from silalib.analysis import claims, plots, tables
from silalib.analysis.verdict import ClaimVerdict, Effect
from silalib.experiments import table1, table3


def test_what_runs_says_what_is_planned_and_what_is_missing():
    grid = table1("quick", [0, 3])
    text = tables.what_runs("quick", grid, dict.fromkeys(grid[:5]))
    assert text.startswith("5 of 36 runs have a record. digits (8x8, enlarged), profile quick, a stand-in")
    assert "; seeds 0, 3; 4 epochs of 256 training images, width 0.125." in text
    assert "31 of 36 runs on digits" in text and "not trained yet" in text


def test_of_exhibit_judges_by_its_effects_alone():
    gains = {0: 1.0, 1: 1.1, 2: 1.2}
    effects = [Effect(f"top-1 ({t})", "points", gains, planned=3, delta=0.5) for t in ("Table 1", "Table 2")]
    lost = Effect("NLL (Table 2)", "nats", {seed: -gain for seed, gain in gains.items()}, planned=3, delta=0.5)
    claim = ClaimVerdict("1", "better", (*effects, lost), "small")
    assert claim.verdict == "contradicted"
    first = claims.of_exhibit(claim, "Table 1")
    assert (first.claim, first.verdict, len(first.effects)) == ("better (Table 1)", "reproduced", 1)


@pytest.fixture
def frame():
    """Two networks and three seeds of two methods; SiLa's Net1 is 1, 2 and 3 above IND's, its Net2 equal."""
    rows = [
        {"method": method, "seed": seed, "net": net, "run": (method, seed), "top1": 50.0 + seed + gain, "ece": np.nan}
        for method in ("ind", "sila")
        for seed in range(3)
        for net in (1, 2)
        for gain in [seed + 1 if (method, net) == ("sila", 1) else 0]
    ]
    return pd.DataFrame(rows)


def test_side_by_side_by_hand(frame):
    ind, sila = (frame[frame["method"] == method] for method in ("ind", "sila"))
    parts = {"IND": ind, "SiLa": sila, "SiLa Net1": sila[sila["net"] == 1], "DML": frame[:0]}
    columns = {"top-1": ("top1", 1), "ECE": ("ece", 2)}
    found = tables.side_by_side(parts, columns, ind, "pair").set_index("pair")
    assert list(found) == ["top-1, to IND", "ECE, to IND", "top-1", "ECE", "seeds"]
    assert list(found["seeds"]) == [3, 3, 3, 0]
    # t of 2 degrees of freedom is 4.3027; 50, 51, 52 have the standard error 1 / sqrt(3)
    assert list(found["top-1"]) == ["51.0 ± 2.5", "52.0 ± 3.7", "53.0 ± 5.0", "not run"]
    assert list(found["top-1, to IND"]) == ["", "+1.0 ± 1.2", "+2.0 ± 2.5", ""]
    assert list(found["ECE"]) == ["not recorded"] * 3 + ["not run"]
    assert list(found["ECE, to IND"]) == [""] * 4


@pytest.mark.parametrize(
    "name, grid, saved",
    [
        ("table1", table1, {"table1a", "table1b"}),
        ("table3", table3, {"table3_cifar10", "table3_cifar100"}),
    ],
)
def test_table_page_stands_without_records(results, name, grid, saved):
    plots.table_page(name, "small", grid("small"), {})
    assert {path.stem for path in (results / "small" / "tables").glob("*.csv")} == saved
    written = (results / "small" / "tables" / f"{min(saved)}.md").read_text()
    assert "; not run" in written and "paper" in written and "ours" not in written
    assert not (results / "small" / "figures").exists()  # a sentence stands in its place


def test_panels_draw_each_interval():
    """The row "not run" has none, and is left out."""
    columns = {"a": [(1.0, 0.5), (2.0, np.nan), (np.nan, np.nan)], "b": [(0.0, 0.1)] * 3}
    columns = {label: [*values, (np.nan, np.nan)] for label, values in columns.items()}
    fig = plots.panels(["x", "y", "z", "not run"], columns, "title")
    first, second = fig.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["x", "y", "z"]
    points = [bars.lines[0].get_xdata() for bars in (first.containers[0], second.containers[0])]
    np.testing.assert_array_equal(points, [[1.0, 2.0, np.nan], [0.0] * 3])
    assert first.containers[0].lines[2][0].get_segments()[0][:, 0].tolist() == [0.5, 1.5]
    plots.plt.close(fig)
