"""The grids of the exhibits against what the paper lists."""

import pytest

from silalib import experiments
from silalib.analysis import tables
from silalib.analysis.tables import schedule
from silalib.errors import UserError
from silalib.experiments import (
    EXHIBITS,
    NOISE,
    PAPER_METHODS,
    PROFILES,
    block,
    choices,
    coupling,
    equal_compute,
    fig3,
    fig4,
    fig5,
    fig6,
    fig7,
    regime,
    table1,
    table2,
    table3,
    tiers,
    turns,
    variants,
)
from silalib.models import NAMES
from silalib.run import Run


@pytest.mark.parametrize("profile", ["quick", "short", "paper"])
def test_table1_has_every_row_of_the_paper(profile):
    grid = table1(profile, [7])
    assert len(grid) == 18 == len(set(grid))
    assert sum(len(run.nets) for run in grid) == 33 + 3  # IND's second networks are in no row
    m, r, v = "mobilenet", "resnet18", "vgg13"
    expected = {("ind", (net, net)) for net in (m, r, v)}
    expected |= {(k, p) for k in ("sila", "dml", "sila+dml") for p in ((m, m), (r, r), (m, r), (v, v), (m, v))}
    assert {(run.method, run.nets) for run in grid} == expected


@pytest.mark.parametrize("profile", ["quick", "short", "paper"])
def test_table2_has_every_row_of_the_paper(profile):
    grid = table2(profile, [7])
    assert len(grid) == 11 == len(set(grid))
    assert sum(len(run.nets) for run in grid) == 22 == len(tables.reported("table2")) + 2
    assert {run.stem for run in grid} == {"imagenet"}


def test_table2_at_the_papers_protocol():
    for run in table2("paper"):
        assert (run.dataset, run.epochs, run.batch_size, run.lr, run.width) == ("imagenet100", 260, 128, 0.1, 1)
        assert (run.augment, run.train_size) == ("flip+rotate15", None)


def test_table3_has_every_row_of_the_paper():
    printed = tables.reported("table3")
    keys = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100"}
    names = {title: net for net, title in NAMES.items()}
    expected = {
        (keys[d], names[n], m.lower()) for d, n, m in zip(printed["dataset"], printed["network"], printed["method"])
    }
    grid = table3("paper", [7])
    assert {(run.dataset, run.nets[0], run.method) for run in grid} == expected
    assert len(grid) == 20
    for run in grid:
        assert run.nets == (run.nets[0],) * 2
        assert (run.augment, run.epochs, run.width) == ("crop+flip+autoaugment", 260, 1)
    assert {run.nets[0] for run in table3("quick")} == {run.nets[0] for run in grid}


def test_three_networks_and_uneven_betas_are_trained():
    assert variants("small") == []  # its hours go into what is judged
    for profile in ("quick", "short", "paper"):
        assert {(len(run.nets), run.betas) for run in variants(profile)} == {(3, None), (2, (1.0, 0.5))}
        pair = next(run for run in table1(profile) if run.nets == ("resnet18",) * 2 and run.method == "sila")
        for run in variants(profile):  # but for this, as in Table 1
            assert {k for k, v in run.config.items() if pair.config[k] != v} <= {"nets", "betas"} | set(NOISE[profile])


def test_the_papers_protocol_is_the_default():
    for run in table1("paper"):
        assert (run.dataset, run.epochs, run.batch_size, run.lr, run.width) == ("cifar100", 260, 128, 0.1, 1)
        assert run.milestones == (30, 55, 80, 105, 135, 160, 180, 200, 220, 240)
    assert {run.seed for run in table1("paper")} == {0, 1, 2}


@pytest.mark.parametrize("profile", ["short", "paper"])
def test_silent_choices_are_settings_of_the_grids_and_no_new_defaults(profile):
    default = Run()
    assert (default.augment, default.gamma, default.nesterov, default.init) == ("crop+flip", 0.5, True, "he")
    for exhibit, augment in ((table1, "crop+flip+rotate15"), (table2, "flip+rotate15"), (table3, None)):
        for run in exhibit(profile, [0]):
            assert (run.gamma, run.nesterov, run.init) == (0.2, False, "pytorch")
            assert run.augment == (augment or "crop+flip+autoaugment")
    for run in [*fig6(profile), *fig4(profile), *fig5(profile)]:
        assert run.init == "he" and not run.nesterov and "rotate" not in run.augment


def test_figure_6_is_the_papers():
    grid = fig6("paper")
    assert {(run.method, run.nets, run.seed) for run in grid} == {
        (method, nets, seed)
        for method, nets in (("ind", ("convnet12",)), ("sila", ("convnet12",) * 2))
        for seed in (0, 1, 2)
    }
    for run in grid:
        assert (run.dataset, run.epochs, run.lr, run.milestones, run.augment) == ("mnist", 20, 0.1, (), "none")
        assert (run.momentum, run.nesterov, run.weight_decay, run.batch_size) == (0.9, False, 5e-4, 128)


def test_figure_3_trains_nothing_of_its_own():
    for profile in PROFILES:
        assert set(fig3(profile)) <= set(table1(profile))
        assert len(fig3(profile, [0, 1])) == 4


MSDNETS = [(fig4, "msdnet_budgeted", 5, 5000), (fig5, "msdnet_anytime", 7, 0)]


@pytest.mark.parametrize("exhibit, net, blocks, holdout", MSDNETS)
def test_figures_4_and_5_are_the_papers(exhibit, net, blocks, holdout):
    grid = exhibit("paper", [0])
    for dataset, name, exits in (("cifar100", net, blocks), ("imagenet100", "msdnet_imagenet", 5)):
        runs = [run for run in grid if run.dataset == dataset]
        assert {(run.method, run.n_heads) for run in runs} == {
            (method, n) for method in ("ind", "sila") for n in (exits, runs[-1].n_heads)
        }
        assert len(runs) == 4 and runs[-1].n_heads < exits  # the same with fewer blocks
        for run in runs:
            assert run.nets == (name,) and run.width == 1 and run.holdout == holdout and run.betas is None
            assert (run.lr, run.gamma, run.warmup, run.weight_decay, run.nesterov) == (0.1, 0.1, 0, 1e-4, False)
            schedule = (run.epochs, run.batch_size, run.milestones, run.augment)
            assert (
                schedule
                == {
                    "cifar100": (300, 64, (150, 255), "crop+flip"),
                    "imagenet100": (90, 256, (30, 60), "flip"),
                }[dataset]
            )
    assert len(grid) == 8
    short = exhibit("short", [0])
    assert [(run.epochs, run.milestones) for run in short[::4]] == [(30, (15, 25.5)), (9, (3, 6))]
    small = exhibit("small", [0])
    assert {(run.dataset, run.train_size, run.epochs, run.milestones, run.blocks) for run in small} == {
        ("cifar100", 10000, 30, (15, 25.5), None)
    }
    assert (net, holdout) in {(run.nets[0], run.holdout) for run in small}
    assert set(fig4("small")) <= set(exhibit("small"))  # the budgeted network serves both figures


def test_figure_7_is_resnet18_of_table_1():
    for profile in PROFILES:
        grid = fig7(profile, [0])
        assert set(grid) <= set(table1(profile, [0]))
        assert {(run.nets, run.method) for run in grid} == {(("resnet18",) * 2, method) for method in PAPER_METHODS}
        assert all(run.noise_images and bool(run.hessian_images) == (profile == "paper") for run in grid)
        assert all(run.hessian_images for run in fig6(profile, [0]))


NOISE_FIELDS = {"noise_images", "noise_sigmas", "noise_draws", "hessian_images"}


def differences(run, base):
    """Fields in which a run is not as the base, but for what is measured at its end, as they stand in the run."""
    return {k: v for k, v in run.config.items() if v != base.config[k] and k not in NOISE_FIELDS}


@pytest.mark.parametrize("profile", PROFILES)
def test_coupling_shares_what_it_can_and_changes_one_thing(profile):
    ind, sila, *others = coupling(profile, [0])
    assert fig3(profile, [0]) == [ind, sila] and ind.nets == sila.nets  # couplings 0 and 1
    arms = {"quick": [4.0, "peer"], "small": [4.0]}.get(profile, [0.5, 2.0, 4.0, "peer"])
    assert [differences(run, sila) for run in others] == [
        {"coupling": arm} if arm != "peer" else {"nets": ["resnet18"], "method": "zero-peer"} for arm in arms
    ]


@pytest.mark.parametrize("profile", PROFILES)
def test_equal_compute_has_one_network_twice_as_long_and_a_mean_peer(profile):
    ind, sila, twice, peer = equal_compute(profile, [0])
    assert [ind, sila] == fig3(profile, [0])
    milestones = [round(2 * m, 4) for m in sila.milestones]
    alone = {"nets": ["resnet18"]}
    assert differences(twice, ind) == alone | {"epochs": 2 * ind.epochs, "milestones": milestones}
    assert differences(peer, ind) == alone | {"method": "mean-peer"}
    assert not any(run.noise_images or run.hessian_images for run in (twice, peer))


@pytest.mark.parametrize("profile", PROFILES)
def test_the_regime_is_half_and_twice_as_long(profile):
    ind, sila, *others = regime(profile, [0])
    assert [ind, sila] == fig3(profile, [0])
    assert [(run.epochs / sila.epochs, run.method, len(run.nets)) for run in others] == [
        (0.5, "ind", 1), (0.5, "sila", 2), (2, "ind", 1), (2, "sila", 2),
    ]  # fmt: skip
    for run in others:
        assert run.milestones == tuple(round(m * run.epochs / sila.epochs, 4) for m in sila.milestones)
    assert equal_compute(profile, [0])[2] in others  # trained once for both


@pytest.mark.parametrize("profile", PROFILES)
def test_other_choices(profile):
    grid = choices(profile, [0])
    mnist = [run for run in grid if "convnet12" in run.nets]
    changes = [differences(run, base) for run, base in zip(mnist[2:], mnist[:2] * 3)]
    assert changes == [{"momentum": 0.0}] * 2 + [{"weight_decay": 0.0}] * 2 + [{"width": 0.5}] * 2
    pairs = [run for run in grid if run not in mnist]
    assert len(pairs) == 8 and (pairs[-2:] == fig3(profile, [0])) == (profile != "quick")
    # three factors at two levels: with the base the half of the combinations, each factor changed in two of four
    changed = [set(differences(run, pairs[-2])) - {"method"} for run in pairs[0:-2:2]]
    assert changed == [{"augment", "nesterov"}, {"augment", "gamma"}, {"nesterov", "gamma"}]
    assert [run.method for run in pairs] == ["ind", "sila"] * 4
    levels = {tuple((run.augment, run.nesterov, run.gamma)[i] for run in pairs) for i in range(3)}
    assert all(len(set(level)) == 2 for level in levels)


def test_only_our_own_exhibits_train_what_the_paper_does_not():
    ours = ("coupling", "equal_compute")
    methods = {run.method for name, e in EXHIBITS.items() if name not in ours for run in e.grid("quick")}
    assert methods <= set(PAPER_METHODS)


# -- seeds, tiers and turns


PLANNED = {"table1": 8, "fig3": 8, "fig7": 8, "fig6": 5, "table3": 5, "fig4": 5, "fig5": 5, "equal_compute": 8}
"""Exhibit -> seeds at `small`, from docs/protocol.md."""


def test_the_seeds_of_small_are_those_of_the_protocol():
    for name, seeds in PLANNED.items():
        assert {run.seed for run in EXHIBITS[name].grid("small")} == set(range(seeds))
    seeds = lambda grid, **wanted: {
        run.seed for run in grid if all(getattr(run, name) == value for name, value in wanted.items())
    }
    for method in PAPER_METHODS:
        assert seeds(table1("small"), method=method) == set(range(8))
    assert seeds(equal_compute("small"), method="mean-peer") == set(range(6))
    assert seeds(equal_compute("small"), epochs=120) == set(range(8))
    assert seeds(coupling("small"), coupling=4.0) == {0, 1, 2}
    assert seeds(regime("small")) == seeds(choices("small")) == {0, 1}


def test_the_tiers_of_small():
    found = tiers("small")
    assert {run for run, tier in found.items() if tier == 1} == {*fig3("small"), *fig6("small")}
    second = [*table1("small"), *fig4("small"), *equal_compute("small")]
    second += [run for run in table3("small") if run.dataset == "cifar100"]
    assert {run for run, tier in found.items() if tier == 2} == set(second) - set(fig3("small"))
    assert set(found) == {run for exhibit in EXHIBITS.values() for run in exhibit.grid("small")}
    for profile in ("quick", "short", "paper"):
        assert set(tiers(profile).values()) == {1}


def test_small_begins_with_an_interval_then_has_a_seed_of_every_page():
    order = turns("small")
    runs = sorted(order, key=order.get)
    tier = tiers("small")
    assert [(tier[run], run.seed) for run in runs[:12]] == [(1, 0)] * 4 + [(1, 1)] * 4 + [(1, 2)] * 4
    one = [run for run in order if tier[run] == 2 and run.seed == 0]
    assert set(runs[12 : 12 + len(one)]) == set(one)
    rest = [(tier[run], run.seed) for run in runs[12 + len(one) :] if tier[run] < 3]
    assert rest == sorted(rest)  # tier 1 to its end, tier 2 seed by seed
    third = [run for run in runs if tier[run] == 3]
    assert runs[-len(third) :] == third and third[0].dataset == "mnist"
    short = turns("short")
    assert [run.seed for run in sorted(short, key=short.get)] == sorted(run.seed for run in short)
    quick = turns("quick")  # page by page: Figure 5's runs first, Table 1's own last
    assert quick.keys() == tiers("quick").keys()
    first, last = (
        {quick[run] for run in fig5("quick")},
        {quick[run] for run in table1("quick", [0]) if run.nets != ("resnet18",) * 2},
    )
    assert first == {min(quick.values())} and last == {max(quick.values())}


def test_a_block_is_what_is_compared():
    found = block("small", "cifar100", 7)
    assert {(run.dataset, run.seed) for run in found} == {("cifar100", 7)}
    assert set(table1("small", [7])) | set(fig4("small", [7])) | set(regime("small", [7])) <= set(found)
    assert block("small", "digits", 0) == []


def test_milestones_scale_with_the_schedule():
    run = experiments.cifar_run("short", ("resnet18",), method="ind")
    assert (run.epochs, run.milestones) == (26, (3, 5.5, 8, 10.5, 13.5, 16, 18, 20, 22, 24))


def test_small_is_real_and_fixed():
    for run in table1("small"):
        assert (run.dataset, run.train_size, run.epochs, run.width) == ("cifar100", 10000, 60, 0.25)
        assert (run.batch_size, run.gamma, run.nesterov, run.augment) == (128, 0.7, True, "crop+flip")
        assert (run.noise_images, run.noise_draws) == (1000, 10)
        assert set(run.nets) == {"resnet18"}
    assert {run.method for run in table1("small")} == {"ind", "sila", "dml", "sila+dml"}
    assert {(run.batch_size, run.epochs, run.augment) for run in table3("small")} == {(32, 60, "crop+flip+autoaugment")}


@pytest.mark.parametrize("name", EXHIBITS)
def test_seeds_and_profiles(name):
    grid = EXHIBITS[name].grid
    two = ("table1", "fig3", "fig6", "fig7")
    assert {run.seed for run in grid("quick")} == ({0, 1} if name in two else {0})
    assert {run.seed for run in grid("paper")} == ({0} if name == "variants" else {0, 1, 2})
    assert {run.seed for run in grid("quick", [5])} == {5}
    with pytest.raises(UserError, match="unknown profile 'fast': choose from quick, small, short, paper"):
        grid("fast")
    for seeds in ("0", 0, [], [-1], [0.5], ["1"]):
        with pytest.raises(UserError, match="give a list of whole numbers"):
            grid("quick", seeds)


def test_no_run_of_quick_needs_a_network():
    assert {run.dataset for exhibit in EXHIBITS.values() for run in exhibit.grid("quick")} == {"digits", "digits64"}


def test_a_schedule_says_what_is_trained_on():
    assert schedule(fig5("small")[0]) == "30 epochs of 10,000 training images, width 1"
    assert schedule(fig4("paper")[0]) == "300 epochs of all but 5,000 training images, width 1"
    assert schedule(fig5("paper")[0]) == "300 epochs of all training images, width 1"
