"""Runs and their keys, records and their verification, ensure() and what it does with failures and stops."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from silalib import data, launch, runs, trainer
from silalib.errors import Damaged, MissingData, Stopped, UserError
from silalib.runs import Run, ensure, find, load, load_folder, load_network, state, write_atomically

# -- a run is its configuration


def test_key_is_readable_and_stable():
    run = Run("digits", ("mobilenet", "vgg13"), "sila+dml", seed=3)
    assert run.key.startswith("digits-mobilenet+vgg13-sila+dml-s3-")
    assert run.key == Run("digits", ("mobilenet", "vgg13"), "sila+dml", seed=3).key
    # written by hand: the fields that are not at their defaults, as sorted JSON, hashed
    text = '{"dataset": "digits", "method": "sila+dml", "nets": ["mobilenet", "vgg13"], "seed": 3}'
    assert run.key.rsplit("-", 1)[1] == hashlib.sha256(text.encode()).hexdigest()[:8]
    assert "/" not in run.key and "*" not in run.key


OTHER = {
    "dataset": "cifar10",
    "nets": ("resnet18", "resnet34"),
    "method": "dml",
    "seed": 1,
    "width": 0.5,
    "stem": "imagenet",
    "betas": (1.0, 2.0),
    "coupling": 0.5,
    "epochs": 10,
    "batch_size": 64,
    "lr": 0.05,
    "milestones": (1, 2),
    "gamma": 0.1,
    "warmup": 0.0,
    "momentum": 0.5,
    "nesterov": False,
    "weight_decay": 1e-4,
    "augment": "none",
    "train_size": 1000,
    "holdout": 100,
    "noise_images": 10,
    "noise_sigmas": 3,
    "noise_draws": 3,
    "hessian_images": 10,
    "blocks": 3,
    "init": "pytorch",
}
"""Another value of each field."""

MSDNET = {"nets": ("msdnet_imagenet",), "stem": "imagenet", "noise_images": 0, "hessian_images": 0}
"""What blocks needs beside it."""


def test_every_field_changes_the_key():
    assert set(OTHER) == {f.name for f in dataclasses.fields(Run)}
    plain = {name: value for name, value in OTHER.items() if name != "blocks"}
    keys = {Run().key} | {Run(**{name: value}).key for name, value in plain.items()}
    keys |= {Run(**MSDNET).key, Run(**MSDNET, blocks=OTHER["blocks"]).key}
    hashes = {key.rsplit("-", 1)[1] for key in keys}
    assert len(keys) == len(hashes) == len(plain) + 3


def test_a_head_belongs_to_a_slot():
    assert [Run().slot(head) for head in (0, 1)] == [0, 1]
    exits = Run(**MSDNET, blocks=3)
    assert [exits.slot(head) for head in range(exits.n_heads)] == [0, 0, 0]


def test_every_field_is_in_the_configuration():
    run = Run(**OTHER | MSDNET | {"method": "sila", "betas": (1, 2, 3)})
    assert Run(**run.config) == run
    assert Run(**run.config).key == run.key
    assert json.loads(json.dumps(run.config)) == run.config


def test_a_new_field_keeps_old_keys():
    @dataclasses.dataclass(frozen=True)
    class Newer(Run):
        label_smoothing: float = 0.0

    for changes in ({}, {"seed": 2, "width": 0.5}):
        assert Newer(**changes).key == Run(**changes).key
    assert Newer(label_smoothing=0.1).key != Run().key


def test_equal_runs_have_equal_keys():
    run = Run(nets=("resnet18",), method="ind", milestones=(1, 2), lr=1, betas=(1,))
    for same in (
        Run(nets="resnet18", method="IND", milestones=[1, 2], lr=1, betas=[1]),
        Run(nets=["resnet18"], method="Ind", milestones=(1.0, 2.0), lr=1.0, betas=(1.0,)),
    ):
        assert same == run
        assert hash(same) == hash(run)
        assert same.key == run.key
    assert len({run: 1} | {Run(nets="resnet18", method="ind", milestones=[1, 2], lr=1, betas=[1]): 2}) == 1


def test_numbers_of_numpy_are_numbers():
    run = Run(seed=np.int64(2), width=np.float64(0.5))
    assert run.key == Run(seed=2, width=0.5).key
    assert run.config == Run(seed=2, width=0.5).config


def test_names():
    assert str(Run(method="SiLa+DML", seed=4)) == "cifar100 resnet18+resnet18 SiLa+DML seed 4"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset": "imagenet"}, "unknown data set 'imagenet'.*cifar100"),
        ({"method": "kd"}, r"unknown method 'kd'.*sila\+dml"),
        ({"nets": ("resnet18", "resnet50")}, "unknown network 'resnet50'.*resnet34"),
        ({"nets": "alexnet", "method": "ind"}, "unknown network 'alexnet'"),
        ({"augment": "flop"}, r"unknown augmentation 'flop'.*crop\+flip"),
        ({"nets": ()}, "at least one network"),
        ({"nets": ("resnet18",), "method": "dml"}, "DML needs at least two"),
        ({"nets": "resnet18", "method": "sila+dml"}, r"SiLa\+DML needs at least two"),
        ({"betas": (1, 1, 1)}, "3 betas for 2 networks"),
        ({"betas": ()}, "0 betas for 2 networks"),
        ({"method": "ind", "coupling": 0.5}, "IND has none"),
        ({"method": "dml", "coupling": 0}, "DML has none"),
        ({"width": 0}, "width must be"),
        ({"width": float("nan")}, "width must be"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"batch_size": -1}, "batch_size must be above 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"seed": -1}, "seed must not be negative"),
        ({"warmup": -0.1}, "warmup must not be negative"),
        ({"momentum": -0.9}, "momentum must not be negative"),
        ({"weight_decay": -5e-4}, "weight_decay must not be negative"),
        ({"holdout": -1}, "holdout must not be negative"),
        ({"noise_images": -1}, "noise_images must not be negative"),
        ({"hessian_images": -1}, "hessian_images must not be negative"),
        ({"train_size": 100}, "train_size 100 is below the batch size 128"),
        ({"train_size": 0}, "train_size 0 is below"),
        ({"epochs": 2.5}, "epochs"),
        ({"batch_size": 32.5}, "batch_size"),
        ({"noise_images": 10, "noise_sigmas": 0}, "noise_sigmas"),
        ({"noise_images": 10, "noise_draws": 0}, "noise_draws"),
        ({"dataset": "mnist", "nets": ("vgg13", "vgg13")}, "32x32"),
        ({"blocks": 3}, "blocks belongs to MSDNet; resnet18 has none"),
        ({"nets": "msdnet_anytime", "blocks": 8}, "blocks must be from 1 to 7 for msdnet_anytime, not 8"),
        ({"nets": "msdnet_budgeted", "blocks": 0}, "blocks must be from 1 to 5"),
        ({"nets": "msdnet_budgeted", "blocks": 1, "method": "dml"}, "DML needs at least two networks or exits"),
        ({"nets": "msdnet_budgeted", "betas": (1, 1)}, "2 betas for 5 exits: give one each"),
        ({"nets": "msdnet_budgeted", "blocks": 2, "betas": (1,)}, "1 betas for 2 exits"),
        ({"nets": ("msdnet_anytime", "resnet18")}, "so it is trained alone"),
        ({"nets": ("msdnet_anytime",) * 2}, "so it is trained alone"),
        ({"nets": "msdnet_anytime", "noise_images": 10}, "are for networks with one head; msdnet_anytime has 7"),
        ({"nets": "msdnet_anytime", "hessian_images": 10}, "are for networks with one head"),
    ],
)
def test_a_bad_configuration_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        Run(**changes)
    assert "\n" not in str(caught.value)
    assert caught.value._render_traceback_() == [f"UserError: {caught.value}"]


# -- files


def test_write_atomically(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")
    assert path.read_bytes() == b"old"
    for step in ("fsync", "replace"):
        with monkeypatch.context() as broken:

            def fail(*_):
                raise OSError("disk full")

            broken.setattr(os, step, fail)
            with pytest.raises(OSError, match="disk full"):
                write_atomically(path, b"new")
        assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]  # nothing temporary is left
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_result_is_written_last(tiny, tmp_path, monkeypatch):
    """It marks a run as finished, so whatever fails before leaves none."""
    written = []
    real = runs.write_atomically

    def remember(path, content):
        written.append(path.name)
        real(path, content)

    monkeypatch.setattr(runs, "write_atomically", remember)
    trainer.train(tiny(nets=("convnet12",), method="ind", epochs=1), tmp_path / "run", "cpu")
    files = {"history.csv", "test.npz", "features.npz", "weights.safetensors", "run.json"}
    assert set(written) == files | {"result.sha256", "result.json"}
    assert written[-1] == "result.json"


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


FILES = ("history.csv", "test.npz", "features.npz", "noise.csv", "weights.safetensors")


def test_a_record_has_these_files(record):
    assert set(record.result["files"]) == {*FILES, "run.json"}
    assert {p.name for p in record.path.iterdir()} == {*FILES, "run.json", "result.json", "result.sha256"}
    assert state(record.run) == "done"
    assert find(record.run) == record.path


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_a_file_is_found(name, record):
    for position in (0, -1):
        flip(record.path / name, position)
        with pytest.raises(UserError, match=f"{name} is damaged: .*trains the run again") as caught:
            load(record.run).read(name)
        assert "\n" not in str(caught.value)
        if name == "weights.safetensors":  # which may be left out of a record
            with pytest.raises(UserError, match="is damaged"):
                load_network(record.run)
        assert state(record.run) == "damaged"
        flip(record.path / name, position)
        assert state(record.run) == "done"


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_missing_file_is_found(name, record):
    (record.path / name).unlink()
    assert state(record.run) == "damaged"
    with pytest.raises(UserError, match=f"{name} is missing"):
        load(record.run).read(name)


@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_a_damaged_or_missing_description_is_found(name, record):
    path = record.path / name
    whole = path.read_bytes()
    for content in (bytes([whole[0] ^ 1]) + whole[1:], whole[: len(whole) // 2], b"", b"{}", b"[]", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(Damaged, match=f"{name} is damaged: .*trains the run again") as caught:
            load(record.run)
        assert "\n" not in str(caught.value)
        assert state(record.run) == "damaged"
        assert ensure([record.run], train=False) == {}
    path.write_bytes(whole)
    assert state(record.run) == "done"


def tamper(record, **changes):
    """Give the record the run.json of another time, with its checksums."""
    path = record.path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
    files = record.result["files"] | {"run.json": hashlib.sha256(path.read_bytes()).hexdigest()}
    runs.write_sealed(record.path / "result.json", record.result | {"files": files})


def test_a_changed_default_cannot_relabel_an_old_record(record):
    tamper(record, config=record.run.config | {"weight_decay": 1e-4, "gamma": 0.1})
    for read in (load, lambda run: ensure([run])):
        with pytest.raises(UserError, match="another gamma, weight_decay: a default changed"):
            read(record.run)
    assert state(record.run) == "damaged"


def test_a_record_from_before_a_field_is_still_good(record):
    tamper(record, config={k: v for k, v in record.run.config.items() if k != "holdout"})
    assert load(record.run).heads == record.heads


def test_another_protocol_is_refused(record):
    tamper(record, protocol=runs.PROTOCOL + 1)
    with pytest.raises(UserError, match=f"protocol {runs.PROTOCOL + 1}, this is {runs.PROTOCOL}"):
        load(record.run)


def test_a_missing_record_says_how_to_get_it(tiny):
    with pytest.raises(UserError, match=r"no record of .*ensure\(\[run\]\)"):
        load(tiny())
    assert find(tiny()) is None
    assert state(tiny()) == "pending"


def test_a_record_is_found_in_every_profile(record, results):
    (results / "paper" / "runs").mkdir(parents=True)
    moved = results / "paper" / "runs" / record.run.key
    record.path.rename(moved)
    assert find(record.run) == moved
    assert ensure([record.run], "quick", train=False)[record.run].heads == record.heads


# -- trained networks


def test_load_network_gives_back_what_was_measured(record):
    whole = data.load("digits")
    for head in (0, 1):
        network = load_network(record.run, head)
        assert not network.training
        with torch.no_grad():
            z = network(whole.test_images)
            torch.testing.assert_close(network(whole.test_images.float() / 255), z, rtol=1e-4, atol=1e-5)
        values = record.heads[head]
        assert F.cross_entropy(z, whole.test_labels).item() == pytest.approx(values["nll"], rel=1e-5)
        top1 = 100 * (z.argmax(1) == whole.test_labels).double().mean().item()
        assert top1 == pytest.approx(values["top1"], abs=0.21)  # one image of 500
    first, second = (load_network(record.run, head)[1].fc.weight for head in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(load_network(record.run)[1].fc.weight, first)


@pytest.mark.parametrize("head", [-1, 2])
def test_load_network_refuses_a_head_that_is_not_there(head, record):
    with pytest.raises(UserError, match=f"head {head}: this run has heads 0 to 1"):
        load_network(record.run, head)


def test_weights_may_be_missing(record):
    (record.path / "weights.safetensors").unlink()
    assert state(record.run) == "done"
    assert load(record.run).history.equals(record.history)
    with pytest.raises(UserError, match=r"weights\.safetensors of .* was not kept"):
        load_network(record.run)


# -- ensure


def forbid(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("nothing should be trained")

    monkeypatch.setattr(trainer, "train", fail)


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """A worker for each core is then one worker of one thread."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)


def test_ensure_trains_once(tiny, results, monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    a, b = (tiny(nets=("convnet12",), method="ind", epochs=1, seed=seed) for seed in (0, 1))
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    first = ensure([b, a, b], "small", workers=1)
    assert list(first) == [b, a]
    assert first[a].path == results / "small" / "runs" / a.key
    assert state(a) == state(b) == "done"
    names = {p.name for p in first[a].path.iterdir()} - {".lock"}
    assert names == {*first[a].result["files"], "result.json", "result.sha256"}
    assert first[a].result["provenance"]["threads"] == 2  # one worker takes both cores
    assert (torch.get_num_threads(), signal.getsignal(signal.SIGINT)) == (threads, handler) != (2, handler)
    forbid(monkeypatch)
    second = ensure([a, b], "quick", workers=1)
    assert list(second) == [a, b]
    assert second[a].result == first[a].result


def test_ensure_without_training_leaves_out_what_is_missing(record, tiny, monkeypatch):
    forbid(monkeypatch)
    missing = tiny(seed=9)
    assert list(ensure([missing, record.run], train=False)) == [record.run]
    assert state(missing) == "pending"
    flip(record.path / "result.json", 0)
    assert ensure([missing, record.run], train=False) == {}


def test_a_failing_run_does_not_stop_the_others(tiny, monkeypatch, capsys):
    good = tiny(nets=("convnet12",), method="ind", epochs=1)
    bad = tiny(lr=1e6)  # the longer one is trained first
    with pytest.raises(UserError, match=r"1 of 2 runs failed, the first: .*not finite") as caught:
        ensure([good, bad], workers=1)
    assert "\n" not in str(caught.value)
    assert (state(good), state(bad)) == ("done", "failed")
    assert "not finite" in capsys.readouterr().err
    assert list(ensure([good, bad], train=False)) == [good]

    trained = []
    real = trainer.train
    monkeypatch.setattr(trainer, "train", lambda run, *rest, **more: (trained.append(run), real(run, *rest, **more))[1])
    with pytest.raises(UserError, match=r"failed before.*--retry"):
        ensure([good, bad], workers=1)
    assert trained == []
    with pytest.raises(UserError, match="not finite"):
        ensure([good, bad], workers=1, retry=True)
    assert trained == [bad]
    assert state(bad) == "failed"


def test_a_run_that_failed_can_succeed(tiny, monkeypatch, capsys):
    run = tiny(nets=("convnet12",), method="ind", epochs=1)
    with monkeypatch.context() as broken:

        def diverge(*_, **__):
            raise trainer.Diverged(run, 1, 2, 0.1)

        broken.setattr(trainer, "train", diverge)
        with pytest.raises(UserError):
            ensure([run], workers=1)
    assert state(run) == "failed"
    (record,) = ensure([run], workers=1, retry=True).values()
    assert state(run) == "done"
    assert not (record.path / "failed.json").exists()


def test_missing_data_does_not_stop_the_others(tiny, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("SILALIB_DATA", str(tmp_path / "data"))
    data.load.cache_clear()
    here = tiny(nets=("convnet12",), method="ind", epochs=1)
    with pytest.raises(MissingData, match="--profile quick"):
        ensure([Run("mnist", "convnet12", "ind", train_size=128), here], workers=1)
    assert state(here) == "done"
    data.load.cache_clear()


def test_data_that_must_be_prepared_are_not_run_and_no_failure(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SILALIB_DATA", str(tmp_path / "data"))
    here = tiny(nets=("convnet12",), method="ind", epochs=1)
    elsewhere = [
        Run("imagenet100", "msdnet_imagenet", method, stem="imagenet", augment="flip") for method in ("ind", "sila")
    ]
    assert list(ensure([*elsewhere, here], workers=1)) == [here]
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("2 of 3 runs not run: ") and "imagenet100 is not prepared" in line
    assert [state(run) for run in elsewhere] == ["pending"] * 2


def test_two_workers_give_what_one_gives(tiny, comparable, tmp_path, monkeypatch, capsys):
    grid = [tiny(nets=("vgg13",) * 2, method=m, epochs=1, augment="crop+flip") for m in ("sila", "dml")]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)  # one thread for each worker
    together = ensure(grid, workers=2, device="cpu")
    assert list(together) == grid
    for run in grid:
        alone = trainer.train(run, tmp_path / "alone" / run.key, "cpu")
        assert comparable(together[run]) == comparable(alone)
        assert together[run].result["provenance"]["threads"] == alone.result["provenance"]["threads"] == 1


def test_a_used_up_budget_stops_and_leaves_the_rest(tiny, capsys):
    grid = [tiny(seed=seed) for seed in (0, 1)]
    with pytest.raises(Stopped, match="stopped with 2 of 2 runs left; start again to go on"):
        ensure(grid, workers=1, budget=0.01)
    assert all(state(run) in ("pending", "started") for run in grid)


def test_a_budget_stops_within_a_run_and_it_goes_on_later(tiny, monkeypatch, capsys):
    run = tiny()
    monkeypatch.setattr(launch.time, "time", lambda: 0.0)
    real, steps = trainer.Training.one_step, []

    def count(self, *batch):
        steps.append(self.step)
        if len(steps) == 3:  # now the budget is used up
            monkeypatch.setattr(launch.time, "time", lambda: 100.0)
        real(self, *batch)

    monkeypatch.setattr(trainer.Training, "one_step", count)
    with pytest.raises(Stopped, match="1 of 1 runs left"):
        ensure([run], workers=1, budget=60)
    assert state(run) == "started"
    assert ensure([run], train=False) == {}
    assert ensure([run], workers=1)[run].heads
    assert steps == [0, 1, 2, 3]
    assert state(run) == "done"


def test_a_signal_stops_after_the_step(tiny, monkeypatch, usual_interrupt):
    run, real = tiny(), trainer.Training.one_step

    def interrupted(self, *batch):
        real(self, *batch)
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer.Training, "one_step", interrupted)
    with pytest.raises(Stopped, match="1 of 1 runs left"):
        ensure([run], workers=1)
    assert state(run) == "started"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_signal_acts_as_usual(usual_interrupt):
    with launch.interruptible() as stopped:
        assert not stopped.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stopped.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_one_process_trains_a_run(tiny, results, capsys):
    run = tiny()
    folder = results / "quick" / "runs" / run.key
    with runs.lock(folder, wait=lambda: True):
        assert state(run) == "running"
        said = []
        with pytest.raises(UserError, match="stopped while waiting"):
            with runs.lock(folder, wait=lambda: False, message=said.append):
                pass
        assert said == ["another process is training this run: waiting for it"]
    assert state(run) == "pending"


def test_who_waited_finds_the_run_done(tiny, trained, results, monkeypatch):
    """A second process that waited for the lock loads the record and does not train again."""
    run, source = trained
    folder = results / "quick" / "runs" / run.key
    forbid(monkeypatch)

    def other_process():
        with runs.lock(folder, wait=lambda: True):
            locked.set()
            time.sleep(0.2)
            shutil.copytree(source, folder, dirs_exist_ok=True)

    locked = threading.Event()
    thread = threading.Thread(target=other_process)
    thread.start()
    locked.wait(10)
    job = launch.Job(folder.parent, "cpu", threads=1, deadline=None, only_whole=False, retry=False)
    outcome = job.train(run, lambda: False, lambda **_: None)
    thread.join()
    assert outcome.startswith("top-1 ")


def test_cost_counts_every_image():
    """Three forwards of each training image and one of each test image, in every epoch."""
    one = Run("digits", "mobilenet", "ind", epochs=1, train_size=128)
    assert launch.cost(dataclasses.replace(one, epochs=5)) == 5 * launch.cost(one)
    assert launch.cost(one) * (3 * 256 + 500) == launch.cost(dataclasses.replace(one, train_size=256)) * (3 * 128 + 500)
    pair = dataclasses.replace(one, nets=("mobilenet", "mobilenet"))
    assert launch.cost(pair) == 2 * launch.cost(one)


def test_load_folder_reads_a_record_anywhere(trained):
    run, folder = trained
    assert load_folder(run, folder).heads == json.loads((folder / "result.json").read_bytes())["heads"]


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_damaged_checkpoint_is_set_aside_and_the_run_starts_again(tiny, results, keep):
    run = tiny()
    folder = results / "quick" / "runs" / run.key
    with pytest.raises(Stopped):
        trainer.train(run, folder, "cpu", stop=lambda: "now")
    checkpoint = folder / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    said = []
    record = trainer.train(run, folder, "cpu", progress=lambda **message: said.append(message.get("text")))
    assert any(text and "checkpoint.pt was damaged" in text for text in said)
    assert (folder / "checkpoint.pt.corrupt").exists()
    assert len(record.history) == 4


def test_bad_workers_and_devices_are_refused_although_nothing_is_left_to_train(record):
    for bad in ({"workers": 0}, {"device": "tpu"}):
        with pytest.raises(UserError):
            ensure([record.run], **bad)


def test_a_damaged_record_is_named_and_left_out_when_nothing_is_trained(record, capsys):
    (record.path / "history.csv").write_bytes(b"epoch\n")
    assert ensure([record.run], train=False) == {}
    assert "history.csv is damaged" in capsys.readouterr().err
    assert ensure([record.run], workers=1)[record.run].heads == record.heads
    assert "history.csv was damaged and is now history.csv.corrupt: the run is trained again" in capsys.readouterr().err
    assert (record.path / "history.csv.corrupt").read_bytes() == b"epoch\n"
    assert state(record.run) == "done"
