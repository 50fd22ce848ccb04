"""What makes records evidence: IND as a pair, fields that cannot be had later, and what is compared trained alike."""

import json
import math
import subprocess
import time
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import train
from scipy.special import logsumexp

from silalib import data, experiments, files, records
from silalib.__main__ import main
from silalib.analysis import statistics, tables
from silalib.data._torchvision import torchvision  # noqa: F401
from silalib.data.augment import epoch_plan, rotate, transform
from silalib.errors import Stopped, UserError
from silalib.files import ROOT
from silalib.launch import ensure, estimate
from silalib.records import failure, load_network, state
from silalib.run import Run
from silalib.training import checkpoint, execution, metrics, provenance

CPU = torch.device("cpu")


def numbers(table):
    return table[[c for c in table.columns if "seconds" not in c and c not in ("gap", "head")]].reset_index(drop=True)


# -- independent training as a pair


@pytest.mark.parametrize(
    "net, changes, half",
    [
        ("resnet18", {}, False),
        ("resnet18", {}, True),
        ("vgg13", {"augment": "crop+flip+rotate15"}, True),
        ("mobilenet", {"init": "pytorch"}, False),  # which is never in half precision
    ],
)
def test_net1_of_inds_pair_is_the_network_trained_alone(net, changes, half, tiny, results):
    """To the last bit, whatever the precision: weights, history, what is kept of each image, noise."""
    base = dict(method="ind", noise_images=20, noise_sigmas=2, noise_draws=2) | changes
    chosen = [tiny(nets=(net,) * n, **base) for n in (2, 1)]
    pair, alone = (train(run, results / "quick" / "runs" / run.key, bf16=half) for run in chosen)
    own = pair.history[pair.history["head"] == 0]
    assert numbers(own).equals(numbers(alone.history)) and own["gap"].notna().all()
    assert pair.heads[0] == alone.heads[0] and pair.heads[1] != alone.heads[0]
    assert all(np.array_equal(pair.test[name], array) for name, array in alone.test.items())
    assert numbers(pair.noise[pair.noise["head"] == 0]).equals(numbers(alone.noise))
    a, b = (load_network(record.run).state_dict() for record in (pair, alone))
    assert all(torch.equal(a[name], b[name]) for name in b)


# -- fields


def logits_of(record, split):
    """float64 logits (C, n, N) of the trained networks, computed once more from the weights."""
    images = split.images.permute(0, 3, 1, 2)
    with torch.no_grad():
        z = [load_network(record.run, head)(images).double().numpy() for head in range(len(record.run.nets))]
    return np.stack(z)


def test_a_record_holds_what_its_networks_make_of_the_images(record):
    """Trained in float32, so its numbers are those of the weights in the record."""
    split = data.splits(record.run, CPU)[0]
    test, train = (logits_of(record, split[name]) for name in ("test", "train"))
    y, seen = split["test"].labels, split["train"].labels
    for head, values in enumerate(record.heads):
        z = torch.tensor(test[head])
        expected = metrics.calibration(z, y)
        for name in ("ece", "nll_scaled", "ece_scaled"):
            assert values[name] == pytest.approx(expected[name], abs=0.05 if "ece" in name else 1e-4), name
        assert values["temperature"] == pytest.approx(expected["temperature"], rel=1e-3)
        assert values["train_ece"] == pytest.approx(metrics.ece(torch.tensor(train[head]), seen), abs=0.5)
        np.testing.assert_allclose(record.test[f"offset_{head}"], test[head].mean(1), rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(record.test[f"s_{head}"], logsumexp(test[head], axis=1), rtol=1e-2, atol=1e-3)
    together, log_p = metrics.ensemble(list(map(torch.tensor, test)), y)
    found = record.result["ensemble"]
    assert list(found) == [*together, "train_disagreement"]
    for name in ("nll", "nll_scaled", "divergence"):
        assert found[name] == pytest.approx(together[name], rel=1e-3), name
    for name in ("top1", "top5", "disagreement"):  # one image of 500 may have two equal logits
        assert found[name] == pytest.approx(together[name], abs=0.21), name
    differ = 100 * (train[0].argmax(1) != train[1].argmax(1)).mean()
    assert found["train_disagreement"] == pytest.approx(differ, abs=1.6)  # one of 64
    assert (record.test["ensemble_predicted"] != log_p.argmax(1).numpy()).mean() < 0.01
    np.testing.assert_allclose(record.test["ensemble_confidence"], log_p.exp().amax(1), atol=2e-3)
    assert record.history["offset"].notna().all()


def test_the_provenance_says_what_machine_and_what_it_took(record):
    origin = record.result["provenance"]
    assert (origin["kind"], origin["amx"]) == ("cpu", execution.amx())
    assert 0 < origin["cpu_seconds"] < 20 * (origin["seconds"] + origin["seconds_final"] + 1)


def test_cpu_seconds_go_on_after_a_pause(tiny, tmp_path):
    """What this process had used before the run does not count; what the run used before its checkpoint does."""
    with pytest.raises(Stopped):
        train(tiny(), tmp_path, stop=iter([None, "now"]).__next__)
    path = tmp_path / "checkpoint.pt"
    state = checkpoint.read_checkpoint(path, "cpu")
    assert 0 < state["cpu_seconds"] < time.process_time()
    path.write_bytes(checkpoint.checkpoint_bytes(state | {"cpu_seconds": 1e6}))
    began = time.process_time()
    found = train(tiny(), tmp_path).result["provenance"]["cpu_seconds"] - 1e6
    assert 0 <= found <= time.process_time() - began + 0.1


def test_one_network_and_exits_have_no_ensemble(tiny, tmp_path):
    exits = dict(nets=("msdnet_anytime",), blocks=2, width=0.125)
    for name, run in (("one", tiny(nets=("convnet12",), method="ind")), ("exits", tiny(**exits))):
        record = train(run, tmp_path / name)
        assert "ensemble" not in record.result and not any("ensemble" in key for key in record.test)
        assert all(
            {"ece", "temperature", "nll_scaled", "ece_scaled", "train_ece"} <= set(head) for head in record.heads
        )


def test_a_record_without_a_field_says_so_and_is_not_changed(record):
    path = record.path / "result.json"
    result = json.loads(path.read_bytes())
    for head in result["heads"]:
        for name in ("ece", "temperature", "nll_scaled", "ece_scaled", "train_ece"):
            del head[name]
    del result["ensemble"]
    files.write_sealed(path, result)
    before = path.read_bytes()
    old = records.load(record.run)
    assert statistics.over_seeds_of([old.heads[0].get("ece")]) == "not recorded"
    assert statistics.over_seeds_of([]) == "not run"
    assert statistics.over_seeds_of([1.0, 3.0], 1) == "2.0 ± 12.7"  # t(0.975, 1) * sqrt(2) / sqrt(2)
    assert path.read_bytes() == before


# -- what is compared is trained alike


@pytest.fixture
def grid(tiny, plan, cores):
    """Three runs of one block, seed 0, and of another, seed 1: one that knows bfloat16, one that does not, one of each.

    On one core: two threads beside another process wait for each other."""
    made = [
        tiny(nets=("resnet18",), method="ind", train_size=32),
        tiny(nets=("mobilenet",), method="ind", train_size=32),
        tiny(nets=("resnet18", "mobilenet"), train_size=32),
    ]
    cores(1)
    grid = lambda profile="quick", seeds=None: [replace(r, seed=s) for s in seeds or (0, 1) for r in made]
    plan(grid)
    return grid()


def precisions(found):
    return [record.result["provenance"]["precision"] for record in found]


@pytest.mark.parametrize("half", [False, True])
def test_a_block_keeps_the_precision_of_its_first_record(half, grid, results, monkeypatch):
    """MobileNet, first, tells nothing; seed 0 began in one precision, this machine would choose the other."""
    resnet, mobilenet = grid[:2]
    for run in (mobilenet, resnet):
        train(run, results / "quick" / "runs" / run.key, bf16=half)
    monkeypatch.setattr(execution, "bfloat16_pays", lambda device: not half)
    found = ensure.ensure(grid, workers=1)
    own = ["bfloat16" if half else "float32", "float32", "bfloat16+float32" if half else "float32"]
    other = ["float32", "float32", "float32"] if half else ["bfloat16", "float32", "bfloat16+float32"]
    assert precisions(found.values()) == own + other
    assert tables.mixed(found) == ""  # within each seed


def test_a_block_keeps_the_precision_of_a_checkpoint(grid, results, monkeypatch):
    resnet, _, mixed, *_ = grid
    folder = results / "quick" / "runs" / resnet.key
    with pytest.raises(Stopped):
        train(resnet, folder, stop=lambda: "now", bf16=False)
    monkeypatch.setattr(execution, "bfloat16_pays", lambda device: True)
    assert ensure.trained_alike([mixed], "quick", results / "quick" / "runs") == {mixed: ("cpu", False)}
    assert precisions(ensure.ensure([mixed, resnet], workers=1).values()) == ["float32"] * 2


def test_a_checkpoint_goes_on_in_its_own_precision(tiny, tmp_path):
    run = tiny(nets=("resnet18",), method="ind")
    for half in (False, True):
        folder = tmp_path / str(half)
        with pytest.raises(Stopped):
            train(run, folder, stop=iter([None, "now"]).__next__, bf16=half)
        record = train(run, folder, bf16=not half)
        assert precisions([record]) == ["bfloat16" if half else "float32"]
        assert "parts" not in record.result["provenance"]


def test_another_kind_of_device_is_refused_in_one_line(grid, results, capsys):
    """The block of seed 0 began on a GPU: nothing of it is trained on a CPU; seed 1 is."""
    resnet, *_ = grid
    folder = results / "quick" / "runs" / resnet.key
    record = train(resnet, folder)
    origin = record.result["provenance"] | {"kind": "cuda"}
    files.write_sealed(folder / "result.json", record.result | {"provenance": origin})
    assert main(["train", "tiny", "--device", "cpu", "--workers", "1"]) == 1
    first, *_, last = capsys.readouterr().err.splitlines()  # told before anything is trained, and at the end
    assert first.startswith("2 of 5 runs are refused on cpu: what they are compared with was trained on cuda")
    assert "SILALIB_RESULTS" in first and last == f"silalib: error: {first}"
    assert [state(run) for run in grid] == ["done", "pending", "pending", "done", "done", "done"]


def test_a_checkpoint_of_another_kind_of_device_is_refused(tiny, tmp_path):
    with pytest.raises(Stopped):
        train(tiny(), tmp_path, stop=lambda: "now")
    path = tmp_path / "checkpoint.pt"
    saved = checkpoint.read_checkpoint(path, "cpu")
    saved["parts"][-1]["kind"] = "cuda"
    path.write_bytes(checkpoint.checkpoint_bytes(saved))
    with pytest.raises(UserError, match=r"was written with --device cuda: .*SILALIB_RESULTS"):
        train(tiny(), tmp_path)
    assert path.exists()


def test_what_was_not_trained_alike_is_named(grid, results, capsys):
    folders = {run: results / "quick" / "runs" / run.key for run in grid[:3]}
    found = {run: train(run, folder, bf16=run is grid[0]) for run, folder in folders.items()}
    assert tables.mixed(found) == "digits (8x8, enlarged), seed 0 (bfloat16 and float32)"
    assert main(["status", "tiny"]) == 0
    assert "not trained alike: digits (8x8, enlarged), seed 0 (bfloat16 and float32)" in capsys.readouterr().out
    del found[grid[0]]
    assert tables.mixed(found) == ""


def test_seeds_outside_of_the_plan_are_named(grid, capsys):
    assert main(["status", "tiny", "--seeds", "1", "7"]) == 0
    assert (
        capsys.readouterr().err
        == "3 runs of seed 7 are outside of what quick plans: shown, judged only with all of twice the seeds\n"
    )


@pytest.mark.parametrize("exhibit, seed, runs", [("fig6", 6, 2), ("fig3", 6, 0), ("table3", 7, 4), ("coupling", 4, 1)])
def test_each_exhibit_plans_its_own_seeds(exhibit, seed, runs, capsys):
    """At `small` Table 1 has eight seeds, Figure 6 and Table 3 five, coupling 4 three."""
    assert main(["status", exhibit, "--profile", "small", "--seeds", str(seed)]) == 0
    told = (
        f"{runs} runs of seed {seed} are outside of what small plans: shown, judged only with all of twice the seeds\n"
        if runs
        else ""
    )
    assert capsys.readouterr().err == told


def test_an_older_record_is_of_the_device_that_it_names(record):
    origin = record.result["provenance"]
    older = {name: value for name, value in origin.items() if name != "kind"}
    assert provenance.device_kind(older) == provenance.device_kind(origin) == "cpu"
    assert provenance.device_kind(older | {"device": "NVIDIA H100 80GB HBM3"}) == "cuda"


def test_what_is_made_of_each_image_is_in_git_only_where_it_is_shown():
    """Of Tables 1 and 3; not of Figure 6, of the regime, of other choices, of controls, of an MSDNet."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "results/*/test.npz"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    shown = {run.key for p in experiments.PROFILES for run in experiments.table1(p) + experiments.table3(p)}
    keys = {line.split("/")[-2] for line in listed.stdout.splitlines()}
    assert {key for key in keys if not key.startswith("tinyimagenet")} <= shown


def test_runs_are_trained_in_their_turns(tiny, plan):
    """Seed by seed, the longest first in each; what no profile plans comes last."""
    long, short = (tiny(epochs=n, method="ind", nets=("convnet12",)) for n in (3, 1))
    grid = lambda profile="quick", seeds=None: [
        replace(run, seed=seed) for run in (short, long) for seed in seeds or (1, 0)
    ]
    plan(grid)
    other = replace(long, epochs=9)
    expected = [long, short, replace(long, seed=1), replace(short, seed=1), other]
    assert ensure.in_turns([other, *grid()], "short") == expected


def test_time_left_is_that_of_this_kind_of_machine(tiny, record):
    """A record of a machine like this one gives its speed; one of another kind does not."""
    run, origin = record.run, record.result["provenance"]
    longer = replace(run, epochs=3 * run.epochs)
    assert estimate.seconds_left([longer], {run: record})[longer] == pytest.approx(3 * origin["cpu_seconds"])
    origin["amx"] = not origin["amx"]
    measured = estimate.seconds_left([longer], {run: record})[longer]
    assert measured != pytest.approx(3 * origin["cpu_seconds"]) and 0 < measured < 600


def test_a_run_that_diverges_keeps_the_others(tiny, plan, cores, capsys):
    cores(1)
    good, bad = tiny(), tiny(lr=1e30)
    plan([bad, good])
    assert main(["train", "tiny", "--workers", "1", "--device", "cpu"]) == 1
    assert [state(run) for run in (bad, good)] == ["failed", "done"]
    assert "the loss is not finite" in failure(bad)["error"]
    assert "Traceback" not in capsys.readouterr().err


# -- the silent choices


def test_init_pytorch_is_every_layers_own(tiny):
    """As torch.nn makes a convolution: uniform within 1/sqrt(fan-in); ours is normal with fan-out."""
    own = tiny(nets=("resnet18",), init="pytorch", width=1.0).network(0)
    ours = tiny(nets=("resnet18",), width=1.0).network(0)
    same = tiny(nets=("resnet18",), init="pytorch", width=1.0).network(0)
    layers = [(n, m) for n, m in own.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(layers) == 20
    for name, layer in layers:
        bound = 1 / math.sqrt(layer.weight[0].numel())
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        fan_out = layer.weight.shape[0] * layer.kernel_size[0] ** 2
        assert ours.get_submodule(name).weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), same.parameters()))
    with pytest.raises(UserError, match="unknown init 'zero': choose from he, pytorch"):
        Run(init="zero")


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (7, 10, 3)])
def test_rotation_is_torchvisions(shape):
    functional = import_module("torchvision.transforms.v2.functional")  # after silalib has imported torchvision
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, *shape), dtype=torch.uint8, generator=g)
    degrees = 15 * (2 * torch.rand(40, generator=g) - 1)
    theirs = [functional.rotate(x.permute(2, 0, 1), d.item()).permute(1, 2, 0) for x, d in zip(images, degrees)]
    ours = rotate(images, degrees)
    assert ours.dtype == torch.uint8
    different = (ours != torch.stack(theirs)).any(-1).double().mean().item()
    assert different < 1e-3  # a pixel halfway between two
    assert torch.equal(rotate(images, torch.zeros(40)), images)
    assert not torch.equal(rotate(images, torch.full((40,), 15.0)), rotate(images, torch.full((40,), -15.0)))


def test_angles_are_drawn_anew_for_every_image_of_every_epoch(tiny):
    run = tiny(augment="crop+flip+rotate15")
    first, second = (epoch_plan(run, epoch, 3000, CPU) for epoch in (0, 1))
    (angle,) = first[3:]
    assert angle.shape == (3000,) and angle.abs().max() <= 15
    assert angle.mean().abs() < 0.7 and angle.std().item() == pytest.approx(15 / math.sqrt(3), rel=0.05)
    assert not torch.equal(angle, second[3])
    plain = epoch_plan(replace(run, augment="crop+flip"), 0, 3000, CPU)
    assert len(plain) == 3 and all(torch.equal(a, b) for a, b in zip(plain, first))  # the same crops and flips
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(transform(images), images)
    assert torch.equal(transform(images, angle[:4]), rotate(images, angle[:4]))
