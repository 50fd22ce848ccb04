"""The grids of the exhibits against what the paper lists."""

import pytest

from silalib import experiments, summary
from silalib.errors import UserError
from silalib.experiments import (
    EXHIBITS,
    NOISE,
    PROFILES,
    coupling,
    fig3,
    fig4,
    fig5,
    fig6,
    fig7,
    schedule,
    table1,
    table2,
    table3,
    variants,
)
from silalib.losses import PAPER_METHODS
from silalib.models import NAMES


@pytest.mark.parametrize("profile", ["quick", "short", "paper"])
def test_table1_has_every_row_of_the_paper(profile):
    grid = table1(profile, [7])
    assert len(grid) == 18 == len(set(grid))
    assert sum(len(run.nets) for run in grid) == 33
    m, r, v = "mobilenet", "resnet18", "vgg13"
    expected = {("ind", (net,)) for net in (m, r, v)}
    expected |= {(k, p) for k in ("sila", "dml", "sila+dml") for p in ((m, m), (r, r), (m, r), (v, v), (m, v))}
    assert {(run.method, run.nets) for run in grid} == expected


@pytest.mark.parametrize("profile", ["quick", "short", "paper"])
def test_table2_has_every_row_of_the_paper(profile):
    grid = table2(profile, [7])
    assert len(grid) == 11 == len(set(grid))
    assert sum(len(run.nets) for run in grid) == 20 == len(summary.reported("table2"))
    assert {run.stem for run in grid} == {"imagenet"}


def test_table2_at_the_papers_protocol():
    for run in table2("paper"):
        assert (run.dataset, run.epochs, run.batch_size, run.lr, run.width) == ("imagenet100", 260, 128, 0.1, 1)
        assert (run.augment, run.train_size) == ("flip", None)


def test_table3_has_every_row_of_the_paper():
    printed = summary.reported("table3")
    keys = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100"}
    names = {title: net for net, title in NAMES.items()}
    expected = {
        (keys[d], names[n], m.lower()) for d, n, m in zip(printed["dataset"], printed["net1"], printed["method"])
    }
    grid = table3("paper", [7])
    assert {(run.dataset, run.nets[0], run.method) for run in grid} == expected
    assert len(grid) == 20
    for run in grid:
        assert run.nets == (run.nets[0],) * (1 if run.method == "ind" else 2)
        assert (run.augment, run.epochs, run.width) == ("crop+flip+autoaugment", 260, 1)
    assert {run.nets[0] for run in table3("quick")} == {run.nets[0] for run in grid}


def test_three_networks_and_uneven_betas_are_trained_in_every_profile():
    for profile in PROFILES:
        assert {(len(run.nets), run.betas) for run in variants(profile)} == {(3, None), (2, (1.0, 0.5))}
        pair = next(run for run in table1(profile) if run.nets == ("resnet18",) * 2)
        for run in variants(profile):  # but for this, as in Table 1
            assert {k for k, v in run.config.items() if pair.config[k] != v} <= {"nets", "betas"} | set(NOISE[profile])


def test_the_papers_protocol_is_the_default():
    for run in table1("paper"):
        assert (run.dataset, run.epochs, run.batch_size, run.lr, run.width) == ("cifar100", 260, 128, 0.1, 1)
        assert run.milestones == (30, 55, 80, 105, 135, 160, 180, 200, 220, 240)
    assert {run.seed for run in table1("paper")} == {0, 1, 2}


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
            assert (run.lr, run.gamma, run.warmup, run.weight_decay, run.nesterov) == (0.1, 0.1, 0, 1e-4, True)
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
    assert {(run.dataset, run.train_size, run.epochs, run.milestones) for run in exhibit("small")} == {
        ("cifar100", 10000, 8, (4, 6.8))
    }


def test_figure_7_is_resnet18_of_table_1():
    for profile in PROFILES:
        grid = fig7(profile, [0])
        assert set(grid) <= set(table1(profile, [0]))
        assert {(run.nets, run.method) for run in grid} == {
            (("resnet18",) * (1 if method == "ind" else 2), method) for method in PAPER_METHODS
        }
        assert all(run.noise_images and (run.hessian_images or profile in ("small", "short")) for run in grid)


@pytest.mark.parametrize("profile", PROFILES)
def test_coupling_shares_what_it_can_and_changes_one_thing(profile):
    grid = coupling(profile, [0])
    ind, sila = grid[:2]
    assert len(grid) == len(set(grid)) == 8
    assert (set(fig3(profile, [0])) == {ind, sila}) == (profile != "quick")
    plain = {"noise_images", "noise_sigmas", "noise_draws", "hessian_images"}
    differences = {
        frozenset((k, str(v)) for k, v in run.config.items() if v != ind.config[k] and k not in plain) for run in grid
    }
    pair = {("nets", "['resnet18', 'resnet18']"), ("method", "sila")}
    milestones = str([2 * m for m in ind.milestones])
    assert differences == {
        frozenset(),
        frozenset(pair),
        *[frozenset({*pair, ("coupling", c)}) for c in ("0.0", "0.5", "2.0", "4.0")],
        frozenset({("method", "zero-peer")}),
        frozenset({("epochs", str(2 * ind.epochs)), ("milestones", milestones)}),
    }


def test_only_the_coupling_trains_what_the_paper_does_not():
    methods = {run.method for name, e in EXHIBITS.items() if name != "coupling" for run in e.grid("quick")}
    assert methods <= set(PAPER_METHODS)


def test_milestones_scale_with_the_schedule():
    assert experiments.scaled_milestones(26) == (3, 5.5, 8, 10.5, 13.5, 16, 18, 20, 22, 24)


def test_small_is_real_and_fixed():
    for run in table1("small"):
        assert (run.dataset, run.train_size, run.epochs, run.width) == ("cifar100", 10000, 30, 0.25)
        assert set(run.nets) == {"resnet18"}
    assert {run.method for run in table1("small")} == {"ind", "sila", "dml", "sila+dml"}


@pytest.mark.parametrize("name", EXHIBITS)
def test_seeds_and_profiles(name):
    grid = EXHIBITS[name].grid
    two = ("table1", "fig3", "fig6", "fig7")
    assert {run.seed for run in grid("quick")} == ({0, 1} if name in two else {0})
    assert {run.seed for run in grid("small")} == ({0} if name == "variants" else {0, 1, 2})
    assert {run.seed for run in grid("quick", [5])} == {5}
    with pytest.raises(UserError, match="unknown profile 'fast': choose from quick, small, short, paper"):
        grid("fast")
    for seeds in ("0", 0, [], [-1], [0.5], ["1"]):
        with pytest.raises(UserError, match="give a list of whole numbers"):
            grid("quick", seeds)


def test_no_run_of_quick_needs_a_network():
    assert {run.dataset for exhibit in EXHIBITS.values() for run in exhibit.grid("quick")} == {"digits", "digits64"}


def test_a_schedule_says_what_is_trained_on():
    assert schedule(fig5("small")[0]) == "8 epochs of 10,000 training images, width 1"
    assert schedule(fig4("paper")[0]) == "300 epochs of all but 5,000 training images, width 1"
    assert schedule(fig5("paper")[0]) == "300 epochs of all training images, width 1"
