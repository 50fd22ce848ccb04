"""The grid of each exhibit at each profile, as code: `table1("quick")` -> list of Runs.

A profile scales the paper's protocol; docs/protocol.md says how, what is judged by these runs, and by which rule."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

from .errors import UserError
from .run import PAPER_MILESTONES, Run

PROFILES = ("quick", "small", "short", "paper")
PAPER_METHODS = ("ind", "sila", "dml", "sila+dml")  # the rows of Tables 1 to 3, in the paper's order
RESNET18 = ("resnet18", "resnet18")
DIGITS = dict(dataset="digits", train_size=512, batch_size=32)

TABLE3 = {
    "vgg19": dict(epochs=5, gamma=0.75, lr=0.05),
    "resnet34": dict(epochs=3, warmup=0.25),
    "mobilenet": dict(batch_size=20, epochs=5, warmup=0.25),
    "wrn16_10": dict(epochs=6, warmup=1.0, gamma=0.85, lr=0.2, width=0.0625),
    "densenet121": dict(batch_size=16, epochs=3, warmup=0.25, lr=0.2),
}
"""The networks of Table 3, and what each needs in `quick` to learn from AutoAugment's images."""

SEEDS = {
    "quick": dict(table1=2, fig6=2),
    "small": dict(table1=8, fig6=5, table3=5, msdnet=5, equal_compute=8, mean_peer=6, regime=2, choices=2),
}
"""Seeds planned before the first record, from 0, of each part that has not 3 (`quick`: 1) of them. What shares the runs
of Table 1 (Figures 3 and 7, and the arms beside them) has those seeds."""

NOISE = {
    "quick": dict(noise_images=100, noise_sigmas=3, noise_draws=2),
    "small": dict(noise_images=1000, noise_sigmas=5),
    "short": dict(noise_images=10000),
    "paper": dict(noise_images=10000, hessian_images=500),
}
"""Robustness is measured on Table 1's ResNet18 (Figure 7), on even numbers of images: the backward pass of an odd
batch crashes torch 2.13 on a CPU with two threads."""

UNMEASURED = dict(noise_images=0, noise_sigmas=10, noise_draws=10, hessian_images=0)
ALONE = dict(nets=("resnet18",), method="ind")
SILENT = dict(augment="crop+flip+rotate15", gamma=0.2, nesterov=False, init="pytorch")
"""Where the paper is silent, `paper` and `short` follow public code whose accuracies are nearest to its IND rows."""

COUPLINGS = (0.0, 0.5, 1.0, 2.0, 4.0)  # weights of SiLa's coupling: 0 is independent training, 1 is SiLa


def check_profile(profile):
    if profile not in PROFILES:
        raise UserError(f"unknown profile {profile!r}: choose from {', '.join(PROFILES)}")


def seeds_for(part, profile, seeds=None):
    """The seeds asked for, or those planned for a part of the profile's grids."""
    check_profile(profile)
    if seeds is None:
        return tuple(range(SEEDS.get(profile, {}).get(part, 1 if profile == "quick" else 3)))
    if not isinstance(seeds, (list, tuple)) or not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise UserError(f"seeds {seeds!r}: give a list of whole numbers from 0, such as [0, 1, 2]")
    return tuple(dict.fromkeys(seeds))


def cifar_run(profile, nets, **changes):
    """One training of Tables 1, 2 and 3 at a profile; the paper's milestones scale with its epochs."""
    settings = {
        "quick": dict(
            dataset="digits", train_size=256, batch_size=16, epochs=4, warmup=0.5, gamma=0.8, width=0.125,
            augment="none",
        ),
        "small": dict(train_size=10000, width=0.25, epochs=60, gamma=0.7),
        "short": SILENT | dict(epochs=26),
        "paper": SILENT,
    }[profile] | changes  # fmt: skip
    if profile != "paper":
        settings["milestones"] = [round(m * settings["epochs"] / 260, 4) for m in PAPER_MILESTONES]
    return Run(nets=nets, **settings)


def pairs_and_ind(profile, seeds, pairs, methods, settings):
    """For each seed every pair with each method, IND of equal ones: its Net1 is the single network to the last bit."""
    return [
        cifar_run(profile, pair, method=method, seed=seed, **settings(pair))
        for seed in seeds
        for pair in pairs
        for method in methods
        if method != "ind" or pair[0] == pair[1]
    ]


def table1(profile="quick", seeds=None):
    """Table 1: five pairs with three methods, and IND of three networks. `small` has ResNet18's pair alone, and that
    pair alone has more than one seed in quick."""
    m, r, v = "mobilenet", "resnet18", "vgg13"
    pairs = [(m, m), RESNET18, (m, r), (v, v), (m, v)] if profile != "small" else [RESNET18]
    settings = lambda pair: NOISE[profile] if pair == RESNET18 else {}
    runs = pairs_and_ind(profile, seeds_for("table1", profile, seeds), pairs, PAPER_METHODS, settings)
    others = seeds_for("others", profile, seeds)
    return [run for run in runs if run.nets == RESNET18 or run.seed in others]


def table2(profile="quick", seeds=None):
    """Table 2: ResNet18 and ResNet34 on ImageNet-100 in three pairs, and IND of both; `small` has ResNet18's."""
    pairs = [RESNET18, ("resnet34", "resnet34"), ("resnet18", "resnet34")][: 1 if profile == "small" else 3]
    settings = dict(dataset="imagenet100", augment="flip" if profile == "small" else "flip+rotate15", stem="imagenet")
    if profile == "quick":
        settings = DIGITS | dict(dataset="digits64", epochs=3, stem="imagenet")  # a size that suits the stem
    return pairs_and_ind(profile, seeds_for("table2", profile, seeds), pairs, PAPER_METHODS, lambda pair: settings)


def table3(profile="quick", seeds=None):
    """Table 3: five networks on CIFAR-10 and CIFAR-100 with AutoAugment, each paired with itself by IND and SiLa.
    quick has digits in place of both, `small` MobileNet only, in batches of 32: it lacked steps."""
    seeds = seeds_for("table3", profile, seeds)
    if profile == "quick":
        parts = [lambda pair: DIGITS | dict(augment="autoaugment") | TABLE3[pair[0]]]
    else:
        base = dict(augment="crop+flip+autoaugment") | (dict(batch_size=32) if profile == "small" else {})
        parts = [lambda pair, name=name: base | dict(dataset=name) for name in ("cifar10", "cifar100")]
    pairs = [(net, net) for net in TABLE3 if profile != "small" or net == "mobilenet"]
    return list(chain(*(pairs_and_ind(profile, seeds, pairs, ("ind", "sila"), settings) for settings in parts)))


def variants(profile="quick", seeds=None):
    """What the equations allow and no table shows, three networks and uneven betas: one seed, nothing in `small`."""
    seed = seeds_for("variants", profile, seeds)[0]
    runs = [cifar_run(profile, ("resnet18",) * 3, seed=seed), cifar_run(profile, RESNET18, seed=seed, betas=(1, 0.5))]
    return runs if profile != "small" else []


def fig3(profile="quick", seeds=None):
    """Figure 3: Table 1's ResNet18, independent and with SiLa."""
    return [run for run in fig7(profile, seeds) if run.method in ("ind", "sila")]


def fig7(profile="quick", seeds=None):
    """Figure 7: Table 1's ResNet18, independent and with each method."""
    return [run for run in table1(profile, seeds) if run.nets == RESNET18]


def fig6(profile="quick", seeds=None, **changes):
    """Figure 6: the 12-layer network with two features at 16 channels, alone (IND) and as a pair (SiLa)."""
    seeds = seeds_for("fig6", profile, seeds)
    scaled = {
        "quick": DIGITS | dict(epochs=8, lr=0.02, noise_images=0, hessian_images=2),
        "small": dict(train_size=10000),
        "short": dict(epochs=2),
        "paper": {},
    }[profile] | changes
    base = Run(
        dataset="mnist", nets="convnet12", method="ind", width=0.25, epochs=20, milestones=(), warmup=0.0,
        nesterov=False, augment="none", noise_images=1000, noise_sigmas=5, noise_draws=5, hessian_images=1000,
    )  # fmt: skip
    runs = [replace(base, seed=seed, **scaled) for seed in seeds]
    return list(chain(*((run, replace(run, nets=("convnet12",) * 2, method="sila")) for run in runs)))


def fig4(profile="quick", seeds=None):
    """Figure 4: the MSDNet for budgeted batch classification, IND and SiLa, with images held out for its thresholds."""
    return exits_grid(profile, seeds, "msdnet_budgeted", fewer=3, holdout=5000)


def fig5(profile="quick", seeds=None):
    """Figure 5: the MSDNet for anytime prediction. `small` has Figure 4's runs first, which serve it too."""
    grid = exits_grid(profile, seeds, "msdnet_anytime", fewer=4, holdout=0)
    return fig4(profile, seeds) + grid if profile == "small" else grid


def exits_grid(profile, seeds, net, fewer, holdout):
    """IND and SiLa over the exits of an MSDNet: CIFAR-100, then ImageNet-100, and both with fewer blocks."""
    seeds = seeds_for("msdnet", profile, seeds)
    cifar = Run(
        nets=net, method="ind", epochs=300, batch_size=64, milestones=(150, 255), gamma=0.1, warmup=0.0,
        weight_decay=1e-4, nesterov=False, holdout=holdout,
    )  # fmt: skip
    imagenet = replace(
        cifar, dataset="imagenet100", nets="msdnet_imagenet", epochs=90, batch_size=256, milestones=(30, 60),
        augment="flip", stem="imagenet",
    )  # fmt: skip
    bases = [cifar, replace(cifar, blocks=fewer), imagenet, replace(imagenet, blocks=3)]
    if profile == "short":
        bases = [replace(b, epochs=b.epochs // 10, milestones=[m / 10 for m in b.milestones]) for b in bases]
    elif profile == "small":
        bases = [replace(cifar, train_size=10000, epochs=30, milestones=(15, 25.5))]
    elif profile == "quick":
        digits = replace(
            cifar, **DIGITS | dict(batch_size=24), holdout=300 if holdout else 0, augment="none", width=0.25, epochs=2,
            milestones=(1, 1.7),
        )  # fmt: skip
        bases = [replace(digits, blocks=blocks) for blocks in (4, 2)]
    return [replace(base, seed=seed, method=m) for base in bases for seed in seeds for m in ("ind", "sila")]


def plain(run, factor=1, **changes):
    """A run of Figure 3 without noise and sharpness, so many times as long (but for warm-up), with other fields."""
    schedule = dict(epochs=round(factor * run.epochs), milestones=[round(factor * m, 4) for m in run.milestones])
    return replace(run, **UNMEASURED | schedule | changes)


def coupling(profile="quick", seeds=None):
    """Figure 3's runs, which are couplings 0 and 1, beside ResNet18 with other couplings and with a zero peer."""
    runs = fig3(profile, seeds_for("others" if profile == "quick" else "table1", profile, seeds))
    shown = (4.0,) if profile in ("quick", "small") else [c for c in COUPLINGS if c not in (0, 1)]
    changes = [dict(coupling=c) for c in shown] + [ALONE | dict(method="zero-peer")] * (profile != "small")
    pairs = [run for run in fig3(profile, seeds_for("coupling", profile, seeds)) if run.method == "sila"]
    return runs + [plain(run, **change) for run in pairs for change in changes]


def equal_compute(profile="quick", seeds=None):
    """Figure 3's runs beside what costs no second network: IND for twice as long, and a peer that is a constant."""
    runs = fig3(profile, seeds_for("equal_compute", profile, seeds))
    pairs, controlled = [run for run in runs if run.method == "sila"], seeds_for("mean_peer", profile, seeds)
    controls = [plain(run, **ALONE | dict(method="mean-peer")) for run in pairs if run.seed in controlled]
    return runs + [plain(run, 2, **ALONE) for run in pairs] + controls


def regime(profile="quick", seeds=None):
    """Figure 3's runs, and the same for half and for twice as long: SiLa's pair, and IND alone."""
    runs = fig3(profile, seeds_for("regime", profile, seeds))
    arms = [(factor, arm) for factor in (0.5, 2) for arm in (ALONE, {})]
    return runs + [plain(run, factor, **arm) for run in runs if run.method == "sila" for factor, arm in arms]


def choices(profile="quick", seeds=None):
    """IND and SiLa under other choices where the paper is silent: Figure 6's network without momentum, without weight
    decay and with twice its channels; and Figure 3's pair with the other augmentation, Nesterov and decay factor, in
    those of the eight combinations with an even number of changes: each is made twice. In quick all are cut short."""
    seeds = seeds_for("choices", profile, seeds)
    cheap, runs, pairs = UNMEASURED, fig6(profile, seeds), fig3(profile, seeds)
    if profile == "quick":
        cheap = UNMEASURED | dict(epochs=1)
        runs, pairs = fig6(profile, seeds, **cheap), [plain(run, 0.25, width=0.0625) for run in pairs]
    for change in (dict(momentum=0.0), dict(weight_decay=0.0), dict(width=0.5)):
        runs += fig6(profile, seeds, **cheap | change)
    rotated = "rotate15" in pairs[0].augment
    augment = dict(augment="crop+flip" if rotated else "crop+flip+rotate15")
    nesterov, factor = dict(nesterov=not pairs[0].nesterov), dict(gamma=0.5 if rotated else 0.2)
    for change in (augment | nesterov, augment | factor, nesterov | factor):
        runs += [plain(run, **change) for run in pairs]
    return runs + pairs


@dataclass(frozen=True)
class Exhibit:
    """One table or figure: its grid, and the notebook that draws it; None for one that has no page."""

    title: str
    grid: Callable
    notebook: str | None


EXHIBITS = {
    "table1": Exhibit("Table 1: CIFAR-100", table1, "01_table1_cifar100"),
    "table2": Exhibit("Table 2: ImageNet-100", table2, "02_table2_imagenet100"),
    "table3": Exhibit("Table 3: AutoAugment", table3, "03_table3_autoaugment"),
    "variants": Exhibit("The method", variants, "00_siamese_labels"),
    "fig3": Exhibit("Figure 3: test accuracy by epoch", fig3, "04_fig3_training_curves"),
    "fig4": Exhibit("Figure 4: budgeted batch classification", fig4, "05_fig4_budgeted_batch"),
    "fig5": Exhibit("Figure 5: anytime prediction", fig5, "06_fig5_anytime"),
    "fig6": Exhibit("Figure 6: features on MNIST", fig6, "07_fig6_mnist_features"),
    "fig7": Exhibit("Figure 7: training NLL and robustness", fig7, "08_fig7_robustness"),
    "coupling": Exhibit("The coupling", coupling, "11_coupling"),
    "equal_compute": Exhibit("Equal compute", equal_compute, "10_equal_compute"),
    "regime": Exhibit("The regime", regime, "13_regime_choices"),
    "choices": Exhibit("The silent choices", choices, "13_regime_choices"),
}


def tiers(profile):
    """Every planned run of a profile -> its tier. `small` has three: 1 and 2 hold what is judged; others have one."""
    found = {}
    for name, exhibit in EXHIBITS.items():
        for run in exhibit.grid(profile):
            first = name in ("fig3", "fig6")
            second = name in ("table1", "fig4", "equal_compute") or (name, run.dataset) == ("table3", "cifar100")
            tier = 1 if first or profile != "small" else 2 if second else 3
            found[run] = min(tier, found.get(run, tier))
    return found


def turns(profile):
    """Every planned run -> its turn: lower ones are trained first, those of one turn the longest first. quick: page by
    page, cheap ones first; `short` and `paper`: seed by seed; `small`: three seeds of tier 1, for an interval, one of
    tier 2, the rest of tier 1, the rest of tier 2 seed by seed, and of tier 3 MNIST, the regime, the others."""
    if profile == "quick":
        first = ("fig5", "fig4", "fig6", "fig7", "equal_compute", "coupling", "variants", "regime", "choices", "table3")
        turn = {name: first.index(name) if name in first else len(first) for name in EXHIBITS}
        late = sorted(EXHIBITS, key=turn.get, reverse=True)  # a run that pages share has the turn of the earliest
        return {run: (turn[name], 0) for name in late for run in EXHIBITS[name].grid(profile)}
    if profile != "small":
        return {run: (0, run.seed) for run in tiers(profile)}
    longer_and_shorter = set(regime(profile))
    part = {
        1: lambda run: 0 if run.seed < 3 else 2,
        2: lambda run: 3 if run.seed else 1,
        3: lambda run: 4 if run.dataset == "mnist" else 5 if run in longer_and_shorter else 6,
    }
    return {run: (part[tier](run), run.seed) for run, tier in tiers(profile).items()}


def block(profile, dataset, seed):
    """The runs of a profile with one data set and one seed, of all exhibits: they are compared, so trained alike."""
    grids = [exhibit.grid(profile, [seed]) for exhibit in EXHIBITS.values()]
    return [run for run in dict.fromkeys(chain(*grids)) if run.dataset == dataset]
