"""Training against a plain loop written from the paper; initial weights, resume, statistics, divergence."""

import hashlib
import inspect
import json
import math
import random
from dataclasses import replace
from functools import partial

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load as load_tensors

from silalib import data
from silalib.data.augment import epoch_plan
from silalib.errors import Stopped, UserError
from silalib.losses import METHODS
from silalib.models import MODELS
from silalib.records import load_network
from silalib.run import Run
from silalib.training import checkpoint, execution, measure, trainer
from silalib.training.execution import Speed, pick_device, precision
from silalib.training.metrics import STATISTICS, statistics
from silalib.training.trainer import learning_rate

CPU = torch.device("cpu")

train = partial(conftest.train, bf16=False)  # what is compared to the last digits is not rounded to bfloat16


# -- the learning rate


@pytest.mark.parametrize("milestones", [(), (1, 2), (1.5, 2.3, 4.0), (0.4, 0.6, 0.8)])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0, 2.0])
def test_learning_rate_is_torchs_multistep_times_linear_warmup(milestones, warmup):
    steps, epochs = 10, 6
    run = Run(epochs=epochs, lr=0.2, gamma=0.5, milestones=milestones, warmup=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduled = [torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(m * steps) for m in milestones], gamma=0.5)]
    if w := round(warmup * steps):
        # from 1/w at the first step to 1 at the w-th
        linear = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / w, total_iters=w - 1)
        scheduled.append(linear)
    for step in range(steps * epochs):
        assert learning_rate(run, step, steps) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        for schedule in scheduled:
            schedule.step()


def test_learning_rate_of_the_paper():
    """260 epochs of 390 steps: ten halvings of 0.1, each at the first step of its epoch."""
    run = Run()
    at = lambda epoch, step=0: learning_rate(run, 390 * epoch + step, 390)
    assert at(0) == pytest.approx(0.1 / 390)
    assert at(0, 389) == pytest.approx(0.1)
    assert at(29, 389) == pytest.approx(0.1)
    assert at(30) == pytest.approx(0.05)
    assert at(104, 389) == pytest.approx(0.1 / 2**3)
    assert at(105) == pytest.approx(0.1 / 2**4)
    assert at(259) == pytest.approx(0.1 / 2**10)


# -- initial weights


def weights(run, slot=0):
    return [p.detach() for p in run.network(slot).parameters()]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_a_slot_starts_equal_in_every_method(tiny):
    alone = weights(tiny(nets=("convnet12",), method="ind"))
    torch.manual_seed(99)
    for method in METHODS:
        assert same(weights(tiny(method=method)), alone)
    assert same(weights(tiny(nets=("convnet12", "mobilenet"))), alone)
    assert same(weights(tiny(lr=0.3, epochs=9, augment="none")), alone)


def test_slots_and_seeds_start_different(tiny):
    run = tiny()
    convolution = lambda seed, slot: weights(replace(run, seed=seed), slot)[0]
    starts = [convolution(seed, slot) for seed in (0, 1) for slot in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])


def test_building_leaves_the_global_generator(tiny):
    state = torch.get_rng_state()
    tiny().network(0)
    assert torch.equal(torch.get_rng_state(), state)


# -- the loop


def smooth_network(classes, channels, width, stem):
    """Without ReLU or max-pool, where a rounding error could switch a unit and change a gradient by percents."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(channels, 4, 3, stride=2, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.Tanh(),
        torch.nn.Conv2d(4, 6, 3, stride=3, bias=False),
        torch.nn.BatchNorm2d(6),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 5 * 5, classes),
    )


def cropped(images, index, offset):
    """The crops of uint8 images (n, H, W, C), one by one."""
    batch = []
    for i, (y, x) in zip(index.tolist(), offset.tolist()):
        bordered = np.pad(images[i], ((4, 4), (4, 4), (0, 0)))
        batch.append(bordered[y : y + images.shape[1], x : x + images.shape[2]])
    return np.stack(batch)


def plain_loss(method, logits, y, betas, coupling):
    """Of each head, to the letter: concatenation, labels y + (c-1)N, KL to each peer as a fixed target."""
    total = 0
    for c, (z, beta) in enumerate(zip(logits, betas)):
        alone = F.cross_entropy(z, y)
        if "sila" in method:
            siamese = F.cross_entropy(torch.cat(logits, 1), y + c * z.shape[1])
            alone = coupling * siamese + (1 - coupling) * alone
        if "peer" in method:  # CE + 2 log(2 cosh(s / 2)), of one network without another; from its own mean s
            s = z.logsumexp(1)
            centred = s - (s.mean().detach() if method == "mean-peer" else 0)
            alone = alone + 2 * (2 * (centred / 2).cosh()).log().mean()
            alone = alone - (2 * math.log(2) if method == "mean-peer" else 0)
        total = total + beta * alone
        if "dml" in method:
            peers = [p for k, p in enumerate(logits) if k != c]
            for peer in peers:
                total = total + F.kl_div(z.log_softmax(1), peer.detach().softmax(1), reduction="batchmean") / len(peers)
    return total


def gradient_of_the_truth(method, logits, y, c, betas, coupling):
    """|dL/dz_y| of each sample from the gradient identities, for one sample in a batch mean times the batch size."""
    p = [z.softmax(1).gather(1, y[:, None])[:, 0] for z in logits]
    alone = betas[c] * (p[c] - 1)
    if "sila" in method:
        share = torch.stack([z.logsumexp(1) for z in logits]).softmax(0)[c]
        alone = coupling * (sum(betas) * share * p[c] - betas[c]) + (1 - coupling) * alone
    if "dml" in method:
        alone = alone + p[c] - sum(p[k] for k in range(len(p)) if k != c) / (len(p) - 1)
    return alone.abs()


def plain_training(run):
    """The run in a loop of its own: (networks, rows of the history)."""
    split = data.splits(run, CPU)[0]
    images, labels = split["train"].images.numpy(), split["train"].labels
    pixels = images.reshape(-1, images.shape[-1]) / 255
    # channels-last as in the trainer: torch's BatchNorm rounds differently in another layout
    layout = {"dtype": torch.float32, "memory_format": torch.channels_last}
    normalised = lambda batch: (
        torch.tensor((batch / 255 - pixels.mean(0)) / pixels.std(0)).permute(0, 3, 1, 2).to(**layout)
    )
    nets = [run.network(slot).to(**layout) for slot in range(len(run.nets))]
    betas = run.betas or (1,) * len(nets)
    groups = [p for net in nets for p in net.parameters()]
    optimizer = torch.optim.SGD(groups, run.lr, 0.9, weight_decay=run.weight_decay, nesterov=True, foreach=False)
    steps, rows = len(labels) // run.batch_size, []
    for step in range(run.epochs * steps):
        epoch, i = divmod(step, steps)
        order, offset, _ = epoch_plan(run, epoch, len(labels), CPU)
        chosen = slice(i * run.batch_size, (i + 1) * run.batch_size)
        x, y = normalised(cropped(images, order[chosen], offset[chosen])), labels[order[chosen]]
        # one epoch of warm-up, and half the rate from the second epoch on
        optimizer.param_groups[0]["lr"] = run.lr * min(1, (step + 1) / steps) * (0.5 if epoch >= 1 else 1)
        if i == 0:
            sums = [dict.fromkeys(STATISTICS, 0.0) for _ in nets]
        logits = [net.train()(x) for net in nets]
        optimizer.zero_grad()
        plain_loss(run.method, logits, y, betas, run.coupling).backward()
        optimizer.step()
        with torch.no_grad():
            s = [z.logsumexp(1) for z in logits]
            for c, z in enumerate(logits):
                z_y = z[torch.arange(len(y)), y]
                wrong = z.masked_fill(F.one_hot(y, z.shape[1]).bool(), -math.inf)
                gaps = [(s[c] - s[k]).abs() for k in range(len(nets)) if k != c]
                values = {
                    "train_nll": F.cross_entropy(z, y),
                    "train_top1": 100 * (z.argmax(1) == y).float().mean(),
                    "z_y": z_y.mean(),
                    "alpha": wrong.logsumexp(1).mean(),
                    "s": s[c].mean(),
                    "gap": torch.stack(gaps).mean() if gaps else math.nan,
                    "equation5": (1 - z.softmax(1)[torch.arange(len(y)), y]).mean(),
                    "gradient": gradient_of_the_truth(run.method, logits, y, c, betas, run.coupling).mean(),
                    "offset": (z.sum(1) / z.shape[1]).mean(),
                }
                for k, v in values.items():
                    sums[c][k] += float(v) / steps
        if i == steps - 1:
            test = normalised(split["test"].images.numpy())
            truth = split["test"].labels
            for c, net in enumerate(nets):
                with torch.no_grad():
                    z = net.eval()(test)
                ranks = (z > z[torch.arange(len(z)), truth][:, None]).sum(1)
                rows.append(
                    {"epoch": epoch + 1, "head": c, "lr": optimizer.param_groups[0]["lr"], **sums[c]}
                    | {"test_nll": F.cross_entropy(z, truth).item()}
                    | {f"test_top{k}": 100 * (ranks < k).double().mean().item() for k in (1, 2, 5)}
                    | {"weight_norm": math.sqrt(sum(float((p.detach() ** 2).sum()) for p in net.parameters()))}
                )
    return nets, rows


CASES = {
    "IND, one network": {"method": "ind", "nets": ("smooth",)},
    "IND": {"method": "ind"},
    "SiLa": {"method": "sila"},
    "DML": {"method": "dml"},
    "SiLa+DML": {"method": "sila+dml"},
    "three networks": {"method": "sila+dml", "nets": ("smooth",) * 3},
    "betas and coupling": {"method": "sila", "betas": (0.5, 2), "coupling": 0.5},
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_a_plain_loop(case, tiny, tmp_path, own_models):
    own_models["smooth"] = smooth_network
    run = tiny(**{"nets": ("smooth",) * 2, "weight_decay": 0.05, "epochs": 3} | CASES[case])
    record = train(run, tmp_path / "run")
    nets, rows = plain_training(run)

    trained = load_tensors(record.read("weights.safetensors"))
    for slot, net in enumerate(nets):
        start = run.network(slot).state_dict()
        for key, expected in net.state_dict().items():
            moved = (expected - start[key]).double().norm()
            apart = (trained[f"{slot}.{key}"] - expected).double().norm()
            assert moved > 0, key
            assert apart <= 1e-4 * moved, key

    history = record.history
    assert list(history.columns) == [*rows[0], "seconds_train", "seconds_test"]
    assert len(history) == len(rows) == run.epochs * len(run.nets)
    for ours, expected in zip(history.to_dict("records"), rows):
        near = {k: pytest.approx(v, rel=1e-4, abs=1e-5, nan_ok=True) for k, v in expected.items()}
        # one image of the 500 may change sides
        near |= {k: pytest.approx(v, abs=100 / 500 * 1.01) for k, v in expected.items() if k.startswith("test_top")}
        assert {k: ours[k] for k in expected} == near


def test_the_loop_needs_no_data_set(tiny, tmp_path, data_folder):
    """What it trains on comes from its material: here from two tensors, where no data set is."""
    run = tiny(dataset="cifar100", noise_images=10, noise_sigmas=1, noise_draws=1)
    images = torch.randint(256, (64, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = data.Split(images, torch.arange(64) % 100)
    material = trainer.Material(run, CPU, {"train": split, "test": split})
    training = trainer.Training(run, CPU, Speed(bf16=False), material=material)
    pauses = checkpoint.Pauses(training, tmp_path)
    training.loop(pauses)
    result, files = measure.final(training, pauses)
    assert training.step == 4 and [head["best_epoch"] in (1, 2) for head in result["heads"]] == [True, True]
    assert {"history.csv", "test.npz", "noise.csv", "features.npz", "weights.safetensors"} == set(files)
    assert not data_folder.exists()


def test_the_loop_fits_on_a_screen():
    """Of one loop for every method and every network, all that a step is."""
    loop = (trainer.Training.loop, trainer.Training.set_step, trainer.Training.update, trainer.Training.forward)
    assert sum(len(inspect.getsource(part).splitlines()) for part in (*loop, trainer.Material.epoch)) <= 80


@pytest.mark.parametrize("nets", [("convnet12",) * 2, ("vgg13",) * 2])
@pytest.mark.parametrize("method, changes", [("sila", {"coupling": 0}), ("ind", {})])
def test_net1_without_coupling_is_the_network_trained_alone(nets, method, changes, tiny, tmp_path):
    """To the last bit, dropout included: the pairing by seed compares methods and nothing else."""
    pair = train(tiny(nets=nets, method=method, epochs=1, **changes), tmp_path / "pair")
    alone = train(tiny(nets=nets[:1], method="ind", epochs=1), tmp_path / "alone")
    a, b = (load_tensors(r.read("weights.safetensors")) for r in (pair, alone))
    assert all(torch.equal(a[k], b[k]) for k in b)
    columns = [c for c in alone.history.columns if c != "gap" and "seconds" not in c]
    first = pair.history[pair.history["head"] == 0].reset_index(drop=True)
    assert first[columns].equals(alone.history[columns])
    assert pair.heads[0] == alone.heads[0]


def test_training_leaves_the_global_generators(tiny, tmp_path):
    states = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    torch.manual_seed(5)
    before = states()
    first = train(tiny(nets=("vgg13",), epochs=1), tmp_path / "a")
    assert states() == before
    torch.manual_seed(99)
    second = train(tiny(nets=("vgg13",), epochs=1), tmp_path / "b")
    assert first.read("weights.safetensors") == second.read("weights.safetensors")


class Masked(torch.nn.Module):
    """A linear network that notes what its dropout keeps, in training and in evaluation."""

    def __init__(self, classes, channels, width, stem):
        super().__init__()
        self.dropout, self.fc = torch.nn.Dropout(), torch.nn.Linear(channels * 32 * 32, classes)

    def forward(self, x):
        Masked.seen[self.training].append(tuple(self.dropout(torch.ones(64)).tolist()))
        return self.fc(x.flatten(1))


def test_dropout_differs_by_slot_and_step_and_not_by_method(tiny, tmp_path, own_models):
    own_models["masked"] = Masked
    masks = {}
    for method in METHODS:
        Masked.seen = {True: [], False: []}
        train(tiny(nets=("masked",) * 2, method=method), tmp_path / method)
        assert set(Masked.seen[False]) == {(1.0,) * 64}
        masks[method] = Masked.seen[True]
    assert len(set(masks["ind"])) == len(masks["ind"]) == 2 * 4  # two slots, four steps
    assert all(m == masks["ind"] for m in masks.values())


# -- interruption


def stop_after(steps):
    """A stop that is true at its n-th question."""
    asked = iter(range(1, 10**6))
    return lambda: "enough" if next(asked) == steps else None


@pytest.fixture(scope="module")
def with_dropout(tiny):
    return tiny(nets=("vgg13", "convnet12"), method="sila+dml", augment="crop+flip", batch_size=16)


@pytest.fixture(scope="module")
def uninterrupted(with_dropout, tmp_path_factory):
    return train(with_dropout, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("step", [1, 4, 6, 8])  # of 8, four an epoch: in an epoch, at an epoch's end, at the end
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(step, with_dropout, uninterrupted, comparable, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Stopped, match=f"enough; step {step} of 8 is saved"):
        train(with_dropout, folder, stop=stop_after(step))
    assert "checkpoint.pt" in (names := {path.name for path in folder.iterdir()})
    assert names <= {"checkpoint.pt", "checkpoint.previous.pt"}
    torch.manual_seed(99)
    asked = []
    record = train(with_dropout, folder, stop=lambda: asked.append(1))
    assert len(asked) == 8 - step  # only what was left
    assert comparable(record) == comparable(uninterrupted)
    assert not (folder / "checkpoint.pt").exists()


def test_a_killed_run_goes_on_from_its_last_checkpoint(with_dropout, uninterrupted, comparable, tmp_path):
    asked = iter(range(1, 10))

    def die():
        if next(asked) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(with_dropout, tmp_path / "run", stop=die, checkpoint_seconds=-1)  # a checkpoint after every step
    asked = []
    record = train(with_dropout, tmp_path / "run", stop=lambda: asked.append(1))
    assert len(asked) == 8 - 5
    assert comparable(record) == comparable(uninterrupted)


def test_resume_says_where_it_goes_on(tiny, tmp_path):
    run = tiny()
    with pytest.raises(Stopped):
        train(run, tmp_path, stop=stop_after(3))
    messages = []
    train(run, tmp_path, progress=lambda **m: messages.append(m))
    assert messages[0] == {"run": run, "step": 3, "total": 4, "resumed": True}


def test_a_checkpoint_of_another_run_is_refused(tiny, tmp_path):
    with pytest.raises(Stopped):
        train(tiny(), tmp_path, stop=stop_after(1))
    with pytest.raises(UserError, match=r"checkpoint.pt is of another configuration: delete it"):
        train(tiny(lr=0.2), tmp_path)


@pytest.mark.parametrize("time_limit, gives_up", [(1400, True), (1500, False)])
def test_a_run_that_would_not_end_in_time_gives_up(time_limit, gives_up, tiny, tmp_path):
    """100 steps, of 10 s after a first one of 500 s, in which algorithms are searched for: 1490 s in all."""
    now = 0.0
    training = trainer.Training(tiny(epochs=50), CPU, Speed())
    pauses = checkpoint.Pauses(training, tmp_path, time_limit=time_limit, clock=lambda: now)
    stopped = False
    while training.step < training.total and not stopped:
        now += 10 if training.step else 500
        training.step += 1
        try:
            pauses.after_step()
        except Stopped as error:
            assert "it would not end in the budget; step 51 of 100 is saved" in str(error)
            stopped = True
    assert stopped == gives_up
    assert (tmp_path / "checkpoint.pt").exists()


def test_a_checkpoint_of_another_format_is_left_behind(uninterrupted, with_dropout, comparable, tmp_path):
    with pytest.raises(Stopped):
        train(with_dropout, tmp_path / "run", stop=stop_after(3))
    path = tmp_path / "run" / "checkpoint.pt"
    state = checkpoint.read_checkpoint(path, "cpu")
    del state["format"], state["cpu_seconds"]  # as older versions wrote it
    path.write_bytes(checkpoint.checkpoint_bytes(state))
    messages, asked = [], []
    record = train(
        with_dropout, tmp_path / "run", stop=lambda: asked.append(1), progress=lambda **m: messages.append(m)
    )
    assert messages[0]["text"] == f"{path} is of another version of silalib: the run starts anew"
    assert ["text" in m for m in messages].count(True) == 1 and len(asked) == 8
    assert comparable(record) == comparable(uninterrupted)


# -- divergence


def test_divergence_is_no_record(tiny, tmp_path):
    run = tiny(lr=1e6)
    with pytest.raises(trainer.Diverged, match="not finite in epoch 1") as caught:
        train(run, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "result.json").exists()


def test_divergence_in_the_last_step_is_no_record(tiny, tmp_path):
    """The loss of the only step is finite, the network that it leaves is not."""
    run = tiny(lr=1e6, epochs=1, batch_size=64)
    with pytest.raises(trainer.Diverged, match="not finite"):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_batch_larger_than_the_data_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="batch size 2000 is above the 1297 training images"):
        train(tiny(train_size=None, batch_size=2000), tmp_path)


# -- what is recorded


def test_statistics_against_a_loop_over_samples():
    g = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(40, 6, generator=g, dtype=torch.float64) for _ in range(3)]
    gradients = [torch.randn(40, 6, generator=g, dtype=torch.float64) for _ in range(3)]
    target = torch.randint(6, (40,), generator=g)
    logsumexp = lambda values: math.log(sum(map(math.exp, values)))
    actual = statistics(logits, gradients, target)
    assert actual.dtype == torch.float64
    for c in range(3):
        expected = dict.fromkeys(STATISTICS, 0.0)
        for i, y in enumerate(target.tolist()):
            z = logits[c][i].tolist()
            s = [logsumexp(head[i].tolist()) for head in logits]
            alpha = logsumexp(z[:y] + z[y + 1 :])
            sample = {
                "train_nll": s[c] - z[y],
                "train_top1": 100.0 * (max(z) == z[y]),
                "z_y": z[y],
                "alpha": alpha,
                "s": s[c],
                "gap": sum(abs(s[c] - s[k]) for k in range(3) if k != c) / 2,
                "equation5": 1 - math.exp(z[y] - s[c]),
                "gradient": abs(gradients[c][i, y].item()) * 40,  # the loss is a mean over 40
                "offset": sum(z) / 6,
            }
            assert s[c] == pytest.approx(np.logaddexp(z[y], alpha))
            for k, v in sample.items():
                expected[k] += v / 40
        assert dict(zip(STATISTICS, actual[c].tolist())) == pytest.approx(expected, rel=1e-9)


def test_statistics_of_one_head_have_no_gap():
    z = torch.randn(4, 3)
    (row,) = statistics([z], [z], torch.tensor([0, 1, 2, 0])).tolist()
    assert math.isnan(row[STATISTICS.index("gap")])
    assert all(map(math.isfinite, [v for k, v in zip(STATISTICS, row) if k != "gap"]))


def test_history(record):
    history, run = record.history, record.run
    assert history["epoch"].tolist() == [1, 1, 2, 2]
    assert history["head"].tolist() == [0, 1, 0, 1]
    assert set(STATISTICS) | {"lr", "test_nll", "test_top1", "test_top2", "test_top5", "weight_norm"} <= set(history)
    np.testing.assert_allclose(history["train_nll"], history["s"] - history["z_y"], rtol=0, atol=1e-5)
    # both heads of a pair see the same distance
    np.testing.assert_allclose(history["gap"][0::2], history["gap"][1::2], rtol=1e-6)
    assert history["lr"].tolist() == pytest.approx([0.1, 0.1, 0.05, 0.05])
    for head in range(len(run.nets)):
        last = history[history["head"] == head].iloc[-1]
        for metric in ("nll", "top1", "top2", "top5"):
            assert record.heads[head][metric] == last[f"test_{metric}"]


def test_best_epoch_is_the_first_of_the_highest(tiny, tmp_path):
    record = train(tiny(epochs=4, lr=0.02, nets=("mobilenet",) * 2), tmp_path / "run")
    for head, values in enumerate(record.heads):
        curve = record.history.loc[record.history["head"] == head, "test_top1"].tolist()
        assert values["best"] == max(curve)
        assert values["best_epoch"] == 1 + curve.index(max(curve))


def test_final_metrics_and_what_is_kept_of_each_image(record):
    run = record.run
    split = data.splits(run, CPU)[0]
    tensors = load_tensors(record.read("weights.safetensors"))
    test = record.test
    assert test["labels"].tolist() == split["test"].labels.tolist()
    for head, values in enumerate(record.heads):
        net = MODELS[run.nets[head]](10, 1, run.width).eval()
        net.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith(f"{head}.")})
        with torch.no_grad():
            x = {k: ((p.images / 255 - tensors["mean"]) / tensors["std"]).permute(0, 3, 1, 2) for k, p in split.items()}
            z = net(x["test"]).double()
            nll = F.cross_entropy(net(x["train"]).double(), split["train"].labels).item()
        assert values["train_nll"] == pytest.approx(nll, rel=1e-4)
        assert values["network"] == run.nets[head]
        assert values["parameters"] == sum(p.numel() for p in net.parameters())
        p, y = z.softmax(1).numpy(), split["test"].labels.numpy()
        truth = p[np.arange(500), y]
        np.testing.assert_allclose(test[f"log_probability_{head}"], np.log(truth), rtol=2e-3)
        np.testing.assert_allclose(test[f"confidence_{head}"], p.max(1), rtol=2e-3)
        np.testing.assert_allclose(test[f"s_{head}"], np.log(np.exp(z.numpy()).sum(1)), rtol=2e-3)
        assert (test[f"predicted_{head}"] == p.argmax(1)).mean() > 0.995
        assert (test[f"top5_{head}"] == ((p > truth[:, None]).sum(1) < 5)).mean() > 0.995
        assert {a.dtype.name for k, a in test.items() if k.startswith(("log", "conf", "s_"))} == {"float16"}


def test_features_are_what_the_last_layer_reads(record):
    features, test, run = record.features, record.test, record.run
    for head, values in enumerate(record.heads):
        f = features[f"test_{head}"].astype(np.float64)
        assert f.shape == (500, 2)
        assert features[f"train_{head}"].shape == (64, 2)
        z = f @ features[f"weight_{head}"].T + features[f"bias_{head}"]
        log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
        truth = log_p[np.arange(500), features["test_labels"]]
        np.testing.assert_allclose(truth, test[f"log_probability_{head}"], rtol=5e-3, atol=5e-3)
        net = load_network(run, head)
        with torch.no_grad():
            f = net[1].embed(net[0](data.load("digits").test_images)).double().numpy()
        np.testing.assert_allclose(features[f"test_{head}"], f, rtol=2e-3, atol=1e-4)  # half precision
        within = between = 0
        for c in range(10):
            group = f[features["test_labels"] == c]
            within += ((group - group.mean(0)) ** 2).sum()
            between += len(group) * ((group.mean(0) - f.mean(0)) ** 2).sum()
        assert values["test_concentration"] == pytest.approx(within / between, rel=1e-3)


def test_noise_curves(record):
    """Two heads, two kinds, sigma 0 once, then two sigmas of two draws; clean NLL on 20 fixed training images."""
    noise, run = record.noise, record.run
    assert len(noise) == 2 * 2 * (1 + 2 * 2)
    split = data.splits(run, CPU)[0]["train"]
    chosen = data.balanced_order(split.labels)[:20]
    assert split.labels[chosen].bincount().tolist() == [2] * 10
    for head in (0, 1):
        with torch.no_grad():
            z = load_network(run, head)(split.images[chosen].permute(0, 3, 1, 2))
        clean = noise.query("head == @head and sigma == 0")
        assert clean["kind"].tolist() == ["absolute", "filter"]
        assert clean["nll"].tolist() == pytest.approx([F.cross_entropy(z, split.labels[chosen]).item()] * 2, rel=1e-4)
    assert noise["nll"].nunique() == 2 * (1 + 2 * 4)


def test_curvature(record):
    for values in record.heads:
        curvature = values["curvature"]
        assert curvature["images"] == 10
        assert curvature["absolute"] > 0 and curvature["filter"] > 0
        assert curvature["absolute"] != curvature["filter"]


def test_what_was_not_asked_for_is_not_there(tiny, tmp_path):
    record = train(tiny(nets=("mobilenet",), method="ind", epochs=1), tmp_path / "run")
    assert set(record.result["files"]) == {"history.csv", "test.npz", "weights.safetensors", "run.json"}
    assert "curvature" not in record.heads[0]
    for name in ("noise", "features"):
        with pytest.raises(UserError, match="was not asked for it"):
            getattr(record, name)


def test_provenance(record):
    provenance = record.result["provenance"]
    assert provenance["torch"] == torch.__version__
    assert provenance["threads"] == 1
    assert provenance["precision"] == "float32"
    assert provenance["data_sha256"] == data.load("digits").checksum
    assert provenance["train_images"] == 64
    assert len(provenance["silalib"]["code"]) == 12
    assert json.loads((record.path / "result.json").read_bytes())["files"] == {
        name: hashlib.sha256((record.path / name).read_bytes()).hexdigest() for name in record.result["files"]
    }


def test_progress_hears_of_every_epoch(tiny, tmp_path):
    messages = []
    run = tiny()
    train(run, tmp_path, progress=lambda **m: messages.append(m))
    epochs = [m for m in messages if "top1" in m]
    assert [(m["run"], m["step"], m["total"]) for m in epochs] == [(run, 2, 4), (run, 4, 4)]
    assert all(len(m["top1"]) == 2 for m in epochs)


# -- devices


def test_pick_device():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda")
    for name, message in [("tpu", "unknown device 'tpu'"), ("meta", "unknown device"), ("cuda:99", "is not here")]:
        with pytest.raises(UserError, match=message):
            pick_device(name)


CUDA = torch.device("cuda")


@pytest.mark.parametrize("units", [False, True])
def test_bfloat16_pays_where_there_are_units_for_it(units, monkeypatch):
    """On a CPU those of AMX: its older instructions for bfloat16 are slower than float32."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: units and not including_emulation)
    for device in (CPU, CUDA):
        assert execution.bfloat16_pays(device) == execution.fast(device).bf16 == units
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not execution.bfloat16_pays(CPU)


@pytest.mark.parametrize("net", MODELS)
def test_precision_of_every_network_on_every_kind_of_device(net):
    """Depthwise convolutions do not gain on a CPU; the features that Figure 6 draws are never rounded."""
    expected = {CPU: torch.bfloat16, CUDA: torch.bfloat16}
    if net == "mobilenet":
        expected[CPU] = torch.float32
    if net == "convnet12":
        expected = dict.fromkeys(expected, torch.float32)
    for device, dtype in expected.items():
        assert precision(net, device, True) == dtype
        assert precision(net, device, False) == torch.float32


def test_precision_is_decided_for_each_network(tiny):
    """Beside a network that stays in float32, one that runs in bfloat16 still does; logits are never rounded to it."""
    training = trainer.Training(tiny(nets=("convnet12", "vgg13")), CPU, Speed(bf16=True))
    alone, rounded = training.predict(training.splits["test"].images)
    assert alone.dtype == rounded.dtype == torch.float32
    assert not torch.equal(rounded, rounded.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        images = training.material.inputs(training.splits["test"].images)
        with torch.no_grad():
            assert torch.allclose(alone, training.nets[0].eval()(images), atol=1e-4)
            exact = training.nets[1].eval()(images)
    assert not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, atol=0.05)


# -- a network with exits


def exits_run(tiny, **changes):
    return tiny(**{"nets": "msdnet_anytime", "blocks": 3, "width": 0.125, "holdout": 50} | changes)


@pytest.fixture(scope="module")
def with_exits(tiny, tmp_path_factory):
    return train(exits_run(tiny), tmp_path_factory.mktemp("exits") / "run")


@pytest.mark.parametrize("method", ["sila", "sila+dml", "zero-peer", "mean-peer"])  # others are alike for networks
def test_exits_train_as_in_a_plain_loop(method, tiny, tmp_path, own_models):
    def smooth(*arguments, **blocks):  # see smooth_network
        network = original(*arguments, **blocks)
        for m in list(network.modules()):
            for name, child in m.named_children():
                if isinstance(child, torch.nn.ReLU):
                    setattr(m, name, torch.nn.Tanh())
        return network

    original = MODELS["msdnet_anytime"]
    own_models["msdnet_anytime"] = smooth
    # seed 1: with seed 0 float32 and float64 of the loop below differ by 1% of one weight's way under mean-peer
    run = exits_run(tiny, method=method, lr=0.02, weight_decay=0.01, batch_size=16, epochs=1, milestones=(), seed=1)
    split = data.splits(run, CPU)[0]["train"]
    assert len(split) == 64 and not np.shares_memory(split.images, data.splits(run, CPU)[0]["holdout"].images)
    images = split.images.numpy()
    network = run.network(0).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), run.lr, 0.9, weight_decay=0.01, nesterov=True, foreach=False)
    order, offset, _ = epoch_plan(run, 0, 64, CPU)
    for step in range(4):
        chosen = slice(16 * step, 16 * step + 16)
        batch = (cropped(images, order[chosen], offset[chosen]) / 255 - images.mean() / 255) / (images / 255).std()
        x = torch.tensor(batch).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
        optimizer.param_groups[0]["lr"] = run.lr * (step + 1) / 4
        optimizer.zero_grad()
        plain_loss(method, list(network(x)), split.labels[order[chosen]], (1, 1, 1), 1).backward()
        optimizer.step()
    record = train(run, tmp_path / "run")
    trained, start = load_tensors(record.read("weights.safetensors")), run.network(0).state_dict()
    for key, expected in network.state_dict().items():
        moved = (expected - start[key]).double().norm()
        assert moved > 0, key
        apart = (trained[f"0.{key}"] - expected).double().norm()
        assert apart <= 1e-3 * moved + 1e-6 * expected.double().norm(), key


def test_every_exit_is_in_the_record(with_exits):
    record = with_exits
    assert len(record.heads) == 3 and record.history["head"].tolist() == [0, 1, 2] * 2
    (parameters,) = {head["parameters"] for head in record.heads}
    network = record.run.network(0)
    assert parameters == sum(p.numel() for p in network.parameters())
    for macs in ("macs", "macs_budgeted"):
        costs = [head[macs] for head in record.heads]
        assert costs == sorted(set(costs))
    assert record.heads[0]["macs"] == record.heads[0]["macs_budgeted"]
    assert record.heads[2]["macs"] < record.heads[2]["macs_budgeted"]
    for head, values in enumerate(record.heads):
        last = record.history[record.history["head"] == head].iloc[-1]
        assert values["top1"] == last["test_top1"] and values["nll"] == last["test_nll"]
        accuracy = 100 * (record.test[f"predicted_{head}"] == record.test["labels"]).mean()
        assert values["top1"] == pytest.approx(accuracy, abs=0.21)  # one image of 500 may have two equal logits
    with pytest.raises(UserError, match="was not asked for it"):
        record.noise  # noqa: B018


def test_held_out_images_are_kept_as_they_are_and_exactly(with_exits):
    """Calibration is of images that were neither trained on nor augmented."""
    run, test = with_exits.run, with_exits.test
    held = data.splits(run, CPU)[0]["holdout"]
    tensors = load_tensors(with_exits.read("weights.safetensors"))
    network = run.network(0).eval()
    network.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("0.")})
    with torch.no_grad():
        exits = network(((held.images / 255 - tensors["mean"]) / tensors["std"]).permute(0, 3, 1, 2))
    assert test["calibration_labels"].tolist() == held.labels.tolist() and len(held.labels) == 50
    for head, z in enumerate(exits):
        confidence, predicted = z.softmax(1).max(1)
        kept = test[f"calibration_confidence_{head}"]
        assert kept.dtype == test[f"confidence_{head}"].dtype == np.float32
        np.testing.assert_allclose(kept, confidence, rtol=1e-5)
        assert (test[f"calibration_predicted_{head}"] == predicted.numpy()).mean() > 0.95


def test_exits_resume_where_they_were_stopped(tiny, with_exits, comparable, tmp_path):
    with pytest.raises(Stopped, match="step 3 of 4 is saved"):
        train(exits_run(tiny), tmp_path / "run", stop=stop_after(3))
    assert comparable(train(exits_run(tiny), tmp_path / "run")) == comparable(with_exits)


def test_load_network_gives_every_exit(tiny, results):
    run = exits_run(tiny, epochs=1)
    record = train(run, results / "quick" / "runs" / run.key)
    whole = data.load("digits")
    with torch.no_grad():
        exits = load_network(run)(whole.test_images)
    assert isinstance(exits, tuple) and len(exits) == 3
    for z, values in zip(exits, record.heads):
        assert F.cross_entropy(z, whole.test_labels).item() == pytest.approx(values["nll"], rel=1e-5)
    with pytest.raises(UserError, match="head 1: this run has one network: leave head at 0"):
        load_network(run, 1)
