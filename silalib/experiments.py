"""The grid of each exhibit at each profile, as code: `table1("quick")` -> list of Runs.

A profile scales the paper's protocol. quick: digits and narrow networks, a stand-in for the real data; small: real
data within reach of two cores, one pair of networks a table; short: a tenth of the schedule; paper: the paper's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from . import data
from .errors import UserError
from .losses import PAPER_METHODS
from .runs import PAPER_MILESTONES, Run

PROFILES = ("quick", "small", "short", "paper")

TABLE1_PAIRS = (
    ("mobilenet", "mobilenet"),
    ("resnet18", "resnet18"),
    ("mobilenet", "resnet18"),
    ("vgg13", "vgg13"),
    ("mobilenet", "vgg13"),
)
"""The pairs of Table 1, in its order of rows."""

TABLE2_PAIRS = (("resnet18", "resnet18"), ("resnet34", "resnet34"), ("resnet18", "resnet34"))

TABLE3_NETS = ("vgg19", "resnet34", "mobilenet", "wrn16_10", "densenet121")

QUICK_TABLE3 = {
    "vgg19": dict(batch_size=32, epochs=7, gamma=0.75, lr=0.05),
    "resnet34": dict(batch_size=32, warmup=0.25),
    "wrn16_10": dict(batch_size=32, epochs=7, warmup=1.0, gamma=0.85, lr=0.2, width=0.0625),
    "mobilenet": dict(epochs=5, warmup=0.25),
    "densenet121": dict(batch_size=16, warmup=0.25, lr=0.2),
}
"""What these networks need in quick to learn from AutoAugment's images."""


def check_profile(profile):
    if profile not in PROFILES:
        raise UserError(f"unknown profile {profile!r}: choose from {', '.join(PROFILES)}")


def scaled_milestones(epochs):
    """The paper's milestones out of 260 epochs for a schedule of another length; the trainer rounds them to steps."""
    return tuple(round(m * epochs / 260, 4) for m in PAPER_MILESTONES)


def seeds_for(exhibit, profile, seeds=None):
    """The seeds asked for, or the profile's own: three; in quick two where an interval is shown, else one."""
    check_profile(profile)
    if seeds is None:
        if profile != "quick":
            return (0, 1, 2)
        return (0, 1) if exhibit in ("table1", "fig3", "fig6", "fig7") else (0,)
    if not isinstance(seeds, (list, tuple)) or not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise UserError(f"seeds {seeds!r}: give a list of whole numbers from 0, such as [0, 1, 2]")
    return tuple(dict.fromkeys(seeds))


def cifar_run(profile, nets, **changes):
    """One training of Tables 1, 2 and 3 at a profile."""
    settings = {
        "quick": dict(
            dataset="digits", train_size=512, batch_size=20, epochs=4, warmup=0.5, gamma=0.8, width=0.125,
            augment="none",
        ),
        "small": dict(train_size=10000, width=0.25, epochs=30, gamma=0.7),
        "short": dict(epochs=26),
        "paper": {},
    }[profile]  # fmt: skip
    settings |= changes
    if profile != "paper":
        settings["milestones"] = scaled_milestones(settings["epochs"])
    return Run(nets=nets, **settings)


NOISE = {
    "quick": dict(noise_images=100, noise_sigmas=4, noise_draws=2, hessian_images=4),
    "small": dict(noise_images=1000, noise_sigmas=5, noise_draws=3),
    "short": dict(noise_images=10000),
    "paper": dict(noise_images=10000, hessian_images=500),
}
"""Robustness is measured on Table 1's ResNet18 (Figure 7).

Even numbers of images: the backward pass of an odd batch crashes torch 2.13 on a CPU with two threads.
"""


def table1(profile="quick", seeds=None):
    """Table 1: three networks alone and five pairs with three methods, 18 trainings a seed; `small` has ResNet18's."""
    check_profile(profile)
    pairs = [pair for pair in TABLE1_PAIRS if profile != "small" or set(pair) == {"resnet18"}]
    noise = lambda pair: NOISE[profile] if set(pair) == {"resnet18"} else {}
    return alone_and_in_pairs(profile, seeds_for("table1", profile, seeds), pairs, PAPER_METHODS, noise)


def alone_and_in_pairs(profile, seeds, pairs, methods, settings):
    """For each seed: every network alone (IND), and every pair with the other methods; settings(pair) -> Run fields."""
    runs = []
    for seed in seeds:
        for pair in pairs:
            for method in methods:
                if method != "ind" or pair[0] == pair[1]:
                    nets = pair if method != "ind" else pair[:1]
                    runs.append(cifar_run(profile, nets, method=method, seed=seed, **settings(pair)))
    return runs


def table2(profile="quick", seeds=None):
    """Table 2: ResNet18 and ResNet34 on ImageNet-100, alone and in three pairs; `small` has ResNet18's.

    quick uses digits of 64x64 pixels, a size that suits the stem for large images.
    """
    check_profile(profile)
    pairs = [pair for pair in TABLE2_PAIRS if profile != "small" or set(pair) == {"resnet18"}]
    settings = dict(dataset="imagenet100", augment="flip")
    if profile == "quick":
        settings = dict(dataset="digits64", batch_size=32)
    seeds = seeds_for("table2", profile, seeds)
    return alone_and_in_pairs(profile, seeds, pairs, PAPER_METHODS, lambda pair: settings | {"stem": "imagenet"})


def table3(profile="quick", seeds=None):
    """Table 3: five networks on CIFAR-10 and CIFAR-100 with AutoAugment, alone and paired with themselves by SiLa.

    quick has digits in place of both, `small` MobileNet only.
    """
    check_profile(profile)
    nets = TABLE3_NETS if profile != "small" else ("mobilenet",)
    pairs, seeds = [(net, net) for net in nets], seeds_for("table3", profile, seeds)
    if profile == "quick":
        settings = lambda pair: dict(augment="autoaugment") | QUICK_TABLE3[pair[0]]
        return alone_and_in_pairs(profile, seeds, pairs, ("ind", "sila"), settings)
    runs = []
    for dataset in ("cifar10", "cifar100"):
        settings = dict(dataset=dataset, augment="crop+flip+autoaugment")
        runs += alone_and_in_pairs(profile, seeds, pairs, ("ind", "sila"), lambda pair, settings=settings: settings)
    return runs


def variants(profile="quick", seeds=None):
    """What the paper's equations allow and its tables do not show: three networks, and uneven betas; one seed."""
    seed = seeds_for("variants", profile, seeds)[0]
    return [
        cifar_run(profile, ("resnet18",) * 3, seed=seed),
        cifar_run(profile, ("resnet18",) * 2, seed=seed, betas=(1, 0.5)),
    ]


def fig3(profile="quick", seeds=None):
    """Figure 3: Table 1's ResNet18, independent and with SiLa."""
    runs = table1(profile, seeds_for("fig3", profile, seeds))
    return [run for run in runs if set(run.nets) == {"resnet18"} and run.method in ("ind", "sila")]


def fig6(profile="quick", seeds=None):
    """Figure 6: the 12-layer network with two features, independent and with SiLa, at 16 channels."""
    check_profile(profile)
    base = Run(
        dataset="mnist", nets=("convnet12",), method="ind", width=0.25, epochs=20, milestones=(), warmup=0.0,
        nesterov=False, augment="none", noise_images=1000, noise_sigmas=5, noise_draws=5, hessian_images=1000,
    )  # fmt: skip
    if profile == "quick":
        base = replace(base, dataset="digits", train_size=512, batch_size=32, epochs=14, lr=0.02, noise_images=0)
        base = replace(base, hessian_images=0)
    elif profile == "small":
        base = replace(base, train_size=10000)
    elif profile == "short":
        base = replace(base, epochs=2)
    runs = []
    for seed in seeds_for("fig6", profile, seeds):
        runs += [replace(base, seed=seed), replace(base, seed=seed, nets=("convnet12",) * 2, method="sila")]
    return runs


def fig4(profile="quick", seeds=None):
    """Figure 4: the MSDNet for budgeted batch classification, IND and SiLa, with images held out for its thresholds."""
    return exits_grid("fig4", profile, seeds, "msdnet_budgeted", fewer=3, holdout=5000)


def fig5(profile="quick", seeds=None):
    """Figure 5: the MSDNet for anytime prediction, IND and SiLa."""
    return exits_grid("fig5", profile, seeds, "msdnet_anytime", fewer=4, holdout=0)


def exits_grid(exhibit, profile, seeds, net, fewer, holdout):
    """IND and SiLa over the exits of an MSDNet with all its blocks and with fewer; CIFAR-100, then ImageNet-100."""
    check_profile(profile)
    cifar = Run(
        nets=net, method="ind", epochs=300, batch_size=64, milestones=(150, 255), gamma=0.1, warmup=0.0,
        weight_decay=1e-4, holdout=holdout,
    )  # fmt: skip
    imagenet = replace(
        cifar, dataset="imagenet100", nets="msdnet_imagenet", epochs=90, batch_size=256, milestones=(30, 60),
        augment="flip", stem="imagenet",
    )  # fmt: skip
    if profile == "quick":
        digits = replace(cifar, dataset="digits", train_size=512, holdout=300 if holdout else 0, augment="none")
        digits = replace(digits, batch_size=24, width=0.25, epochs=3, milestones=(1.5, 2.55))
        bases = [replace(digits, blocks=blocks) for blocks in (4, 2)]
    elif profile == "small":
        base = replace(cifar, train_size=10000, epochs=8, milestones=(4, 6.8))
        bases = [base, replace(base, blocks=fewer)]
    else:
        bases = [cifar, replace(cifar, blocks=fewer), imagenet, replace(imagenet, blocks=3)]
        if profile == "short":
            bases = [
                replace(base, epochs=base.epochs // 10, milestones=tuple(m / 10 for m in base.milestones))
                for base in bases
            ]
    seeds = seeds_for(exhibit, profile, seeds)
    return [replace(base, seed=seed, method=m) for base in bases for seed in seeds for m in ("ind", "sila")]


def fig7(profile="quick", seeds=None):
    """Figure 7: Table 1's ResNet18, independent and with each method."""
    runs = table1(profile, seeds_for("fig7", profile, seeds))
    return [run for run in runs if set(run.nets) == {"resnet18"}]


COUPLINGS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Weights of SiLa's coupling: 0 is independent training, 1 is SiLa."""


def coupling(profile="quick", seeds=None):
    """Not in the paper: Figure 3's runs beside ResNet18 with other couplings, with a zero peer, and IND twice as long.

    The last, and the pair at coupling 0, which is two independent networks, cost as much training as SiLa. In quick
    all are narrower than Figure 3's, to save time.
    """
    cheaper = dict(width=0.0625) if profile == "quick" else {}
    plain = dict(noise_images=0, noise_sigmas=10, noise_draws=10)
    runs = fig3(profile, seeds_for("coupling", profile, seeds))
    runs = [replace(run, **cheaper, **plain) for run in runs] if cheaper else runs
    for ind in [run for run in runs if run.method == "ind"]:
        alone = replace(ind, **plain)
        runs += [replace(alone, nets=ind.nets * 2, method="sila", coupling=c) for c in COUPLINGS if c != 1]
        runs.append(replace(alone, method="zero-peer"))
        runs.append(replace(alone, epochs=2 * ind.epochs, milestones=[2 * m for m in ind.milestones]))
    return runs


@dataclass(frozen=True)
class Exhibit:
    """One table or figure of the paper: its grid, and the notebook that draws it."""

    title: str
    grid: Callable
    notebook: str


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
    "coupling": Exhibit("The coupling", coupling, "08_fig7_robustness"),
}


def not_run(grid, records):
    """A line of Markdown for each data set with runs that have no record: how many, and how to get them; or ""."""
    lines = []
    for name in dict.fromkeys(run.dataset for run in grid if run not in records):
        runs = [run for run in grid if run.dataset == name]
        missing = sum(run not in records for run in runs)
        how = "they are not trained yet"
        if not data.here(name):
            how = "its data are not here, they are downloaded by training"
            if data.dataset(name).prepared:
                how = f"its data are not here: `python -m silalib data {name} --from DIR` prepares them from your own"
                how += " copy, see `data/README.md`"
        lines.append(f"**Not run:** {missing} of {len(runs)} runs on {data.dataset(name).title}; {how}.\n")
    return "\n".join(lines)


def training_images(run):
    """How many images a run is trained on, in words."""
    return f"{run.train_size:,}" if run.train_size else f"all but {run.holdout:,}" if run.holdout else "all"


def schedule(run):
    """What a figure is labelled with beside its `title`: epochs, training images, width."""
    return f"{run.epochs} epochs of {training_images(run)} training images, width {run.width:g}"


def scale(profile):
    """A sentence about how far a profile is from the paper's schedule; "" for the paper's own."""
    if profile == "paper":
        return ""
    ours, papers = (schedule(table1(p)[0]) for p in (profile, "paper"))
    return f"Not the paper’s scale: Table 1, for one, is trained for {ours}; in the paper for {papers}."


def title(profile, dataset):
    """What a figure or table is labelled with: the data it was trained on and the profile."""
    stand_in = ", a stand-in for the real data" if profile == "quick" else ""
    return f"{data.dataset(dataset).title}, profile {profile}{stand_in}"
