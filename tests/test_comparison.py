"""`silalib.compare`: paired methods on one's own networks and data, judged honestly, resumed, and refused in words."""

import os
import random
import re
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import silalib
from silalib import UserError, compare, comparison
from silalib.comparison import Comparison
from silalib.errors import Stopped
from silalib.files import ROOT
from silalib.losses import independent
from silalib.randomness import derive, generator

BAD = UserError, Stopped


def network():
    return nn.Sequential(nn.Linear(13, 16), nn.Tanh(), nn.Linear(16, 3))


def with_dropout():
    return nn.Sequential(nn.Linear(13, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def wine():
    """((x, y) to train on, (x, y) to test on) of scikit-learn's wine, standardised."""
    from sklearn.datasets import load_wine

    x, y = load_wine(return_X_y=True)
    x, y = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32), torch.tensor(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return (x[order[:100]], y[order[:100]]), (x[order[100:]], y[order[100:]])


@pytest.fixture
def tiny(wine):
    """tiny(**changes) -> a comparison of a second: IND alone, two seeds, two epochs."""

    def run(make=network, train=wine[0], test=wine[1], **changes):
        usual = dict(epochs=2, methods=("ind",), seeds=2, equal_compute=False, device="cpu", progress=False)
        return compare(make, train, test, **usual | changes)

    return run


@pytest.fixture(scope="module")
def shared(wine):
    """A whole comparison that several tests read; one name would be markup, and a cell's border."""
    methods = {"ind": "ind", "sila": "sila", "<b>|mine": lambda logits, y: independent(logits, y.roll(1))}
    settings = dict(epochs=6, methods=methods, seeds=3, device="cpu", progress=False)
    return compare(network, *wine, optimizer=lambda net: torch.optim.SGD(net.parameters(), 0.3), **settings)


def timeless(frame):
    return frame.drop(columns=[name for name in frame.columns if "seconds" in name])


def same(a, b):
    pd.testing.assert_frame_equal(timeless(a), timeless(b), check_exact=True)


def test_a_training_is_a_plain_loop(wine, tiny):
    """SiLa by torch's own cross-entropy over the concatenated logits, AdamW, 5% warm-up, cosine; the last batch of 36
    is kept. Weights come from (seed, slot), the order from (seed, epoch)."""
    (x, y), (test_x, test_y) = wine
    ours = tiny(methods=("sila",), seeds=[3, 4], epochs=4).to_frame().query("method == 'sila' and seed == 3")
    nets = []
    for slot in range(2):
        torch.manual_seed(derive(3, "weights", slot))
        nets.append(network())
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-3) for net in nets]
    for epoch in range(4):
        order = torch.randperm(100, generator=generator(3, "epoch", epoch))
        for i, rows in enumerate(order.split(64)):
            step = 2 * epoch + i
            z = [net(x[rows]) for net in nets]
            loss = sum(F.cross_entropy(torch.cat([z[c], z[1 - c]], 1), y[rows]) for c in range(2))
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 1e-3 * min(step + 1, (1 + np.cos(np.pi * step / 8)) / 2)
                optimizer.step()
    expected = [F.cross_entropy(net(test_x), test_y).item() for net in nets]
    assert ours["nll"].tolist() == pytest.approx(expected, abs=1e-5)
    right = [100 * (net(test_x).argmax(1) == test_y).double().mean().item() for net in nets]
    assert ours["top1"].tolist() == pytest.approx(right)
    p = sum(net(test_x).softmax(1) for net in nets) / 2
    assert ours["ensemble_nll"].tolist() == pytest.approx([F.nll_loss(p.log(), test_y).item()] * 2, abs=1e-5)


class Augmented(Dataset):
    """Wine with noise from all three global generators."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        noise = torch.rand(13) + random.random() + np.random.rand()  # noqa: NPY002
        return self.x[i] + 0.1 * noise.float(), int(self.y[i])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_copy_of_independent_gains_nothing(wine, tiny, workers):
    """To the last bit, with dropout and augmentation, whoever fetches the batches, and though the copy draws too."""

    def copy(logits, y):
        torch.rand(7), random.random()
        return independent(logits, y)

    loader = DataLoader(Augmented(*wine[0]), batch_size=40, num_workers=workers)
    found = tiny(with_dropout, loader, methods={"ind": "ind", "copy": copy})
    assert found.verdicts[["gain", "half_width", "verdict"]].to_numpy().tolist() == [[0.0, 0.0, "undecided"]]
    by_method = [found.history[found.history["method"] == name] for name in ("ind", "copy")]
    same(*(part.drop(columns="method").reset_index(drop=True) for part in by_method))
    assert by_method[0]["train_nll"].nunique() == len(by_method[0])
    if workers:
        same(
            found.to_frame(),
            tiny(with_dropout, DataLoader(Augmented(*wine[0]), 40), methods={"ind": "ind", "copy": copy}).to_frame(),
        )


@pytest.mark.slow
def test_a_bad_loss_is_worse(wine):
    """A third of the labels of every batch are wrong."""

    def bad(logits, y):
        return independent(logits, torch.where(torch.arange(len(y)) % 2 == 0, (y + 1) % 3, y))

    rate = lambda net: torch.optim.AdamW(net.parameters(), lr=0.01)
    found = compare(network, *wine, epochs=60, methods={"ind": "ind", "bad": bad}, optimizer=rate, progress=False)
    assert found.verdicts["verdict"].tolist() == ["worse", "worse"] and (found.verdicts["gain"] < 0).all()


def test_the_control_is_ind_for_longer(wine, tiny, shared):
    again = tiny(epochs=4).to_frame()
    control = tiny(equal_compute=True).to_frame()
    assert control["method"].unique().tolist() == ["ind", "ind x2"]
    same(
        again.drop(columns="method"),
        control[control["method"] == "ind x2"].drop(columns="method").reset_index(drop=True),
    )
    assert "ind x2" in set(shared.verdicts["against"]) and "ind x2" not in set(shared.verdicts["method"])


def test_the_verdicts_are_paired_and_share_their_level(shared):
    """By hand: Student's t over the seeds, at 1 - 0.05/4 for two methods and two baselines."""
    means = shared.to_frame().groupby(["method", "seed"])["top1"].mean()
    assert len(shared.verdicts) == 4
    for row in shared.verdicts.itertuples():
        gains = (means[row.method] - means[row.against]).to_numpy()
        half = student.ppf(1 - 0.05 / 4 / 2, 2) * gains.std(ddof=1) / 3**0.5
        assert (row.gain, row.half_width) == pytest.approx((gains.mean(), half))
        if gains.std() == 0:
            assert row.verdict == ("undecided" if gains.mean() == 0 else "no verdict")
        else:
            assert row.verdict == (
                "worse" if gains.mean() < -half else "better" if gains.mean() > half else "undecided"
            )
            assert f"a gain below {half:.2f} would not be visible" in row.remark


def test_a_gain_without_spread_is_no_verdict():
    """Every sample is right with IND, and wrong with a loss for the other label, in every seed."""
    y = torch.arange(40) % 2
    data = (2.0 * y - 1)[:, None], y
    flipped = {"ind": "ind", "flipped": lambda logits, y: independent(logits, 1 - y)}
    settings = dict(epochs=20, methods=flipped, seeds=2, batch_size=20, equal_compute=False, progress=False)
    found = compare(
        lambda: nn.Linear(1, 2), data, data, optimizer=lambda net: torch.optim.SGD(net.parameters(), 1.0), **settings
    )
    assert found.verdicts.iloc[0].tolist() == ["flipped", "ind", -100.0, 0.0, "no verdict", "no spread over seeds"]


def test_one_seed_has_no_interval(tiny):
    with pytest.warns(UserWarning, match="one seed has no interval and judges nothing"):
        found = tiny(seeds=1, methods=("ind", "sila"))
    row = found.verdicts.iloc[0]
    assert np.isnan(row["half_width"]) and (row["verdict"], row["remark"]) == ("no verdict", "one seed")


def test_it_says_whether_ind_has_converged(tiny):
    fast = lambda net: torch.optim.AdamW(net.parameters(), lr=0.03)
    said = lambda found: [note for note in found.notes if note.startswith("ind has not converged")]
    assert said(tiny(equal_compute=True, seeds=3))
    constant = lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    assert "still fell" in said(tiny(epochs=3, optimizer=fast, schedule=constant))[0]
    assert said(tiny(epochs=60, optimizer=fast)) == []


# what is given, and what of it is refused


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


class Strange(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.layer, self.give = nn.Linear(13, 3), give

    def forward(self, x):
        return self.give(self.layer(x))


def refused():
    x, y = torch.zeros(9, 13), torch.arange(9) % 3
    net, normed = network(), lambda: nn.Sequential(nn.BatchNorm1d(13), nn.Linear(13, 3))
    gaps = x.clone()
    gaps[4, 2] = torch.nan
    strange = lambda give: {"make": lambda: Strange(give)}
    return {
        "stream": ({"train": Stream()}, "train_set must be a Dataset with a length"),
        "stream in a loader": ({"test": DataLoader(Stream())}, "test_set must be a Dataset with a length"),
        "no data set": ({"train": 7}, "train_set must be .* not int"),
        "empty": ({"train": (x[:0], y[:0])}, "train_set has no samples"),
        "empty test": ({"test": (x[:0], y[:0])}, "test_set has no samples"),
        "unequal lengths": ({"train": (x, y[:5])}, "train_set: .*mismatch"),
        "NaN": ({"train": (gaps, y)}, "train_set has NaN"),
        "NaN in a data set": ({"test": TensorDataset(gaps, y)}, "test_set has NaN"),
        "no labels": ({"train": TensorDataset(x)}, "train_set must give batches"),
        "labels that are numbers": ({"train": (x, y.float())}, "one class index a sample"),
        "a label too many": ({"test": (x, y + 1)}, "labels from 0 to 3 for networks with 3 classes"),
        "a negative label": ({"train": (x, y - 1)}, "labels from -1 to 2"),
        "a network": ({"make": net}, "must be a function that makes a network"),
        "the same network": ({"make": lambda: net}, "must make a new network"),
        "three functions": ({"make": [network] * 3}, "or 2 such functions"),
        "a faulty function": ({"make": lambda: 1 / 0}, "make_network: division by zero"),
        "other classes": ({"make": [network, lambda: nn.Linear(13, 4)]}, "networks for 3 and 4 classes"),
        "no tensor": (strange(lambda z: z.tolist()), "the network gives list: it must give logits"),
        "nothing": (strange(lambda z: None), "the network gives NoneType"),
        "no batch": (strange(lambda z: z[0]), r"the network gives \(3,\)"),
        "other inputs": ({"make": lambda: nn.Linear(12, 3)}, "the network fails on 36 samples.*mat1"),
        "a batch of one": ({"make": normed, "batch_size": 8, "train": (x, y)}, "fails on 1 samples, an epoch's last"),
        "unknown method": ({"methods": ("ind", "magic")}, "unknown methods .*magic.*: choose from ind, sila"),
        "taken name": ({"methods": {"ind": independent}}, "rename your method"),
        "one network": ({"methods": ("dml",), "networks": 1}, "'dml': mutual learning needs at least two heads"),
        "a loss of one": ({"methods": {"one": lambda z, y: independent(z[:1], y)}}, "network without a gradient"),
        "no loss": ({"methods": {"none": lambda z, y: None}}, "a training step of 'none'"),
        "a loss of NaN": ({"methods": {"nan": lambda z, y: torch.nan * sum(z).sum()}}, "'nan' leaves .* not finite"),
        "no optimizer": ({"optimizer": lambda net: None}, "a training step of 'ind'"),
        "faulty metric": ({"metrics": {"m": lambda z, y: z.nothing}}, "no attribute 'nothing'"),
        "epochs": ({"epochs": 0}, "give whole numbers from 1"),
        "batch size": ({"batch_size": 2.5}, "give whole numbers from 1"),
        "no seeds": ({"seeds": 0}, r"seeds \[\]: give whole numbers"),
        "a seed below 0": ({"seeds": [-1, 2]}, "give whole numbers from 0"),
        "seeds": ({"seeds": 2.5}, "seeds, methods or networks: "),
        "budget": ({"budget": -1}, "give seconds"),
        "device": ({"device": "toaster"}, "unknown device"),
        "folder": ({"folder": __file__}, "folder: .*exists"),
    }  # fmt: skip


@pytest.mark.parametrize("case", refused())
def test_what_cannot_be_trained_is_told_in_a_line(case, tiny, capsys):
    changes, expected = refused()[case]
    with pytest.raises(UserError, match=expected) as error:
        tiny(**changes | {"progress": True})
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert "trainings" not in capsys.readouterr().err, "it had begun"


def test_equal_starting_weights_are_warned_of(tiny):
    def equal(make):
        torch.manual_seed(0)
        return make()

    with pytest.warns(UserWarning, match="two networks start with equal weights"):
        tiny(lambda: equal(network))
    tiny(lambda: equal(with_dropout))


class Rows(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {"features": self.x[i], "labels": int(self.y[i])}


class Output(dict):
    @property
    def logits(self):
        return self["logits"]


class Named(nn.Module):
    """As of a hub: it takes named inputs, and gives a dictionary with its logits as an attribute."""

    def __init__(self):
        super().__init__()
        self.layers = network()

    def forward(self, features):
        return Output(logits=self.layers(features))


def test_all_forms_of_data_and_networks_train_alike(wine, tiny):
    expected = timeless(tiny(batch_size=50).to_frame())
    loader = DataLoader(TensorDataset(*wine[0]), batch_size=50, shuffle=True, drop_last=True)
    arrays = tuple(part.double().numpy() if part.is_floating_point() else part.numpy() for part in wine[0])
    for changes in [
        {"train": TensorDataset(*wine[0])},
        {"train": arrays},
        {"train": loader, "batch_size": 7},
        {"train": Rows(*wine[0]), "test": Rows(*wine[1]), "make": Named},
        {"train": Rows(*wine[0]), "test": Rows(*wine[1]), "forward": lambda net, batch: net(batch["features"])},
        {"make": [network, network]},
    ]:
        pd.testing.assert_frame_equal(timeless(tiny(**{"batch_size": 50} | changes).to_frame()), expected)


class Exits(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.first, self.last = nn.Linear(13, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = self.body(x).relu()
        return self.first(x), self.last(x)


def test_a_tuple_of_logits_is_exits(tiny):
    found = tiny(Exits, networks=1, methods=("ind", "sila", "dml"), equal_compute=True)
    frame = found.to_frame()
    assert frame["method"].unique().tolist() == ["ind", "sila", "dml"], "one network has no control"
    assert frame[["network", "exit"]].drop_duplicates().to_numpy().tolist() == [[1, 1], [1, 2]]
    assert not any("ensemble" in name for name in frame)
    pair = tiny(Exits, methods=("ind",)).to_frame()
    assert pair[["network", "exit"]].drop_duplicates().to_numpy().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


def test_own_metrics_are_beside_the_others(wine, tiny):
    frame = tiny(metrics={"recall": lambda z, y: 100 * (z.argmax(1) == y)[y == 2].double().mean()}).to_frame()
    assert {"top1", "nll", "ece", "recall", "ensemble_recall", "seconds"} <= set(frame.columns)
    assert frame["recall"].between(0, 100).all()


# interrupted, and resumed


class Counting:
    """A loss that does something at one of its calls, counted from the first training."""

    def __init__(self, at=None, what=lambda: None):
        self.calls, self.at, self.what = 0, at, what

    def __call__(self, logits, y):
        self.calls += 1
        if self.calls == self.at:
            self.what()
        return independent(logits, y)

    def __repr__(self):
        return "Counting"


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def fail():
    raise RuntimeError("out of luck")


@pytest.mark.parametrize("what, raised", [(ctrl_c, Stopped), (fail, RuntimeError)])
def test_what_was_stopped_goes_on(what, raised, tiny, tmp_path, usual_interrupt):
    """In the second seed, in the third of four epochs of two steps: after Ctrl-C no step is done twice, after an error
    those since the last checkpoint, which is at the end of an epoch."""
    settings = dict(epochs=4, folder=tmp_path / "kept", make=with_dropout)
    whole, again = Counting(), Counting()
    expected = tiny(**settings | {"methods": {"own": whole}, "folder": None})
    with pytest.raises(raised) as error:
        tiny(**settings, methods={"own": Counting(1 + 8 + 5, what)})
    if raised is Stopped:
        assert re.search(r"stopped with 3 of 4 trainings finished: what was begun is in .*kept, call", str(error.value))
    found = tiny(**settings, methods={"own": again})
    resumed = again.calls
    same(found.to_frame(), expected.to_frame())
    same(found.history, expected.history)
    assert whole.calls == 1 + 16 and resumed - 1 in ([3] if raised is Stopped else [4, 6])
    tiny(**settings, methods={"own": again})
    assert again.calls == resumed + 1, "nothing was left, but for the rehearsal"
    assert not list(tmp_path.rglob("checkpoint*"))


def test_without_a_folder_ctrl_c_says_how_to_keep(tiny, usual_interrupt):
    with pytest.raises(Stopped, match="stopped with 1 of 4 trainings finished: give a folder to keep them"):
        tiny(methods={"own": Counting(3, ctrl_c)})


@pytest.mark.slow
def test_kill_and_resume(tmp_path):
    """SIGKILL in the middle of a training: the frame is that of a run that was left alone."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\nimport torch\nfrom torch import nn\nfrom silalib import compare\n"
        "from silalib.losses import siamese_labels\ntorch.set_num_threads(1)\nstate = {'calls': 0}\n"
        "def own(logits, y):\n    state['calls'] += 1\n"
        "    if state['calls'] == int(sys.argv[2]):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return siamese_labels(logits, y)\n"
        "x = torch.randn(90, 5, generator=torch.Generator().manual_seed(0))\ny = (x[:, 0] > 0).long()\n"
        "make = lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 2))\n"
        "found = compare(make, (x[:60], y[:60]), (x[60:], y[60:]), epochs=6, methods={'own': own}, seeds=2,\n"
        "                batch_size=16, folder=sys.argv[1], progress=False)\n"
        "print(found.to_frame().drop(columns='seconds').to_csv())\n"
    )

    def run(folder, at):
        command = [sys.executable, script, tmp_path / folder, str(at)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    assert run("a", 1 + 24 + 14).returncode == -signal.SIGKILL
    assert list(tmp_path.glob("a/*/checkpoint.pt"))
    resumed, alone = run("a", 0), run("b", 0)
    assert resumed.returncode == alone.returncode == 0, resumed.stderr
    assert resumed.stdout == alone.stdout and resumed.stdout.count("\n") > 12


def test_the_budget_gives_what_is_finished(tiny, tmp_path, monkeypatch):
    """The budget ends with the metric of the third of four trainings; the second call trains the rest."""
    calls = []
    monkeypatch.setattr(comparison, "monotonic", lambda: len(calls))

    def counted(z, y):
        calls.append(None)  # 6 in the rehearsal: twice two networks and their ensemble; then 3 for each training
        return 0.0

    settings = dict(metrics={"counted": counted}, methods=("ind", "sila"), folder=tmp_path, epochs=1)
    part = tiny(**settings, budget=8)
    done = part.to_frame()[["method", "seed"]].drop_duplicates()
    assert done.to_numpy().tolist() == [["ind", 0], ["sila", 0], ["ind", 1]]
    assert part.verdicts["verdict"].tolist() == ["so far, 1 of 2 seeds"]
    assert part.notes[0].startswith("3 of 4 trainings") and "so far" in str(part)
    whole = tiny(**settings)
    assert len(whole.to_frame()) == 8 and whole.notes[0].startswith("4 of 4 trainings")


def test_a_budget_for_nothing_says_so(tiny):
    with pytest.raises(Stopped, match="stopped with 0 of 2 trainings finished: give a folder"):
        tiny(budget=1e-9)


def test_a_second_call_knows_what_it_has(wine, tiny, tmp_path, capsys):
    """What is new is trained: a seed, a method; other settings, data, functions and networks are other trainings."""
    settings = dict(folder=tmp_path, progress=True, epochs=1)

    def trained(**changes):
        tiny(**settings | changes)
        return int(re.search(r"(\d+) trainings of", capsys.readouterr().err + "0 trainings of")[1])

    assert trained() == 2 and trained() == 0
    assert trained(seeds=3) == 1
    assert trained(methods=("sila", "ind")) == 2
    x, y = wine[0]
    flipped = x.clone()
    flipped[7, 3] *= -1
    for changes in [
        {"epochs": 2},
        {"batch_size": 32},
        {"train": (flipped, y)},
        {"test": (flipped, y)},
        {"make": with_dropout},
        {"optimizer": lambda net: torch.optim.AdamW(net.parameters(), lr=2e-3)},
        {"schedule": lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)},
        {"forward": lambda net, batch: net(-batch[0])},
    ]:
        assert trained(**changes) == 2, changes
    for weight in (1.0, 2.0):
        assert trained(methods={"ind": "ind", "w": lambda z, y, weight=weight: weight * independent(z, y)}) == 2
    damaged = sorted(tmp_path.glob("ind-s0-*/result.json"))
    for path in damaged:
        path.write_text("{")
    assert trained() == 1


def test_a_method_that_diverges_ends_alone(tiny):
    grows = {"ind": "ind", "grows": lambda logits, y: -sum(z.square().sum() for z in logits)}
    large = lambda net: torch.optim.SGD(net.parameters(), lr=1e2)
    found = tiny(methods=grows, optimizer=large, epochs=6)
    assert found.to_frame()["method"].unique().tolist() == ["ind"]
    row = found.verdicts.iloc[0]
    assert row["verdict"] in ("not run", "no verdict") and "grows seed 0: the loss is not finite" in row["remark"]


def test_where_all_diverge_there_is_no_verdict(tiny):
    linear = lambda: nn.Sequential(nn.Linear(13, 8), nn.Linear(8, 3))
    large = lambda net: torch.optim.SGD(net.parameters(), 50)
    found = tiny(linear, methods=("ind", "sila"), optimizer=large, epochs=8)
    assert found.to_frame().empty and found.summary().empty and found.notes[0].startswith("4 of 4 trainings")
    assert "the loss is not finite" in found.verdicts.iloc[0]["remark"] and "sila" in str(found)


# what comes back


def test_a_comparison_says_what_it_found(shared):
    frame, text = shared.to_frame(), str(shared)
    assert isinstance(shared, Comparison) and len(frame) == 4 * 3 * 2
    assert frame.columns.tolist()[:4] == ["method", "seed", "network", "top1"] and (frame["seconds"] > 0).all()
    epochs = shared.history.groupby("method")["epoch"].max()
    assert epochs.to_dict() == {"ind": 6, "sila": 6, "<b>|mine": 6, "ind x2": 12}
    assert {"test_top1", "train_nll", "lr"} <= set(shared.history.columns)
    assert shared.summary()["method"].tolist() == ["ind", "sila", "<b>|mine", "ind x2"]
    mean = frame.loc[frame["method"] == "sila", "top1"].mean()
    assert shared.summary().set_index("method").loc["sila", "top1"].startswith(f"{mean:.2f} ± ")
    assert text == repr(shared) and "98.8% intervals" in text and "100 training and 78 test samples" in text
    page = shared._repr_html_()
    assert "&lt;b&gt;|mine" in page and "<b>" not in page and page.count("<table") == 2
    markdown = shared.to_markdown()
    assert r"| <b>\|mine | ind x2 |" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {8, 6}
    frame["top1"] = -1.0
    assert not shared.to_frame().equals(frame)


def test_a_comparison_draws_its_gains(shared):
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    assert shared.plot(ax) is ax
    assert [label.get_text() for label in ax.get_yticklabels()] == ["sila", "<b>|mine"]
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"over ind", "over ind x2"}
    drawn = sorted(x for container in ax.containers for x in container[0].get_xdata())
    assert drawn == pytest.approx(sorted(shared.verdicts["gain"]))
    plt.close(fig)


def test_it_says_what_it_costs(tiny, capsys):
    tiny(methods=("ind", "sila"), equal_compute=True, progress=True)
    said = capsys.readouterr().err
    assert said.startswith("6 trainings of 2 networks, 16 epochs in all\n")
    assert re.search(r"^about \d+ s in all, by the first epoch$", said, re.M)
    order = re.findall(r"\d/6 runs, .*?(ind x2|ind|sila) seed (\d)", said)
    assert order == [(m, s) for s in "01" for m in ("ind", "sila", "ind x2")], "breadth first over seeds"
    tiny()
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_readmes_lines_print_what_it_says(tmp_path):
    """In an empty folder, but for the digits, which another processor may round otherwise."""
    text = (ROOT / "README.md").read_text()
    code, printed = re.search(r"```python\n([^`]*import compare\n.*?)```.*?```text\n(.*?)```", text, re.DOTALL).groups()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    masked = lambda text: re.sub(r"[-+]?\d+(\.\d+)?|better|worse|undecided", "#", text).split()
    assert masked(done.stdout) == masked(printed)
    assert len([line for line in code.splitlines() if line]) == 10 and not list(tmp_path.iterdir())


def test_it_leaves_the_global_generators(tiny):
    states = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    before = states()
    first = tiny(with_dropout)
    assert states() == before
    torch.manual_seed(99)
    same(tiny(with_dropout).to_frame(), first.to_frame())


def test_the_name_is_a_function():
    """Also after the module was imported, which a module of that name would have hidden."""
    assert callable(silalib.compare) and "compare" in silalib.__all__
    assert Comparison.__module__ == "silalib.comparison"
    assert callable(silalib.compare)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_copy_is_paired(wine, tiny):
    """Up to rounding: the copy's gain is that of a sample or two."""
    methods = {"ind": "ind", "copy": lambda logits, y: independent(logits, y)}
    found = tiny(with_dropout, methods=methods, device="cuda", epochs=5)
    assert found.to_frame()["nll"].between(0, 2).all() and found.verdicts["gain"].abs().max() < 3
