"""Runs and their keys, records and their verification, ensure() and what it does with failures and stops."""

import csv
import dataclasses
import hashlib
import io
import json
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import train

from silalib import data, files, records
from silalib.errors import CorruptFile, MissingData, Stopped, UserError
from silalib.files import write_atomically
from silalib.launch import estimate, processes, workers
from silalib.launch.ensure import ensure, train_all
from silalib.records import find, load, load_network, state, write_failure, write_record
from silalib.run import PROTOCOL, Run
from silalib.training import checkpoint, trainer

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


def test_write_atomically(tmp_path):
    """What cannot be written, or not be renamed, leaves what was there, and nothing temporary."""
    path, blocked = tmp_path / "file.json", tmp_path / "folder"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")
    assert path.read_bytes() == b"old"
    blocked.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(blocked, b"new")
    assert {p.name for p in tmp_path.iterdir()} == {"file.json", "folder"}
    write_atomically(path, b"new", tmp_path / "previous.json")
    assert (path.read_bytes(), (tmp_path / "previous.json").read_bytes()) == (b"new", b"old")


@pytest.mark.parametrize("rows", [
    [{"epoch": 1, "lr": 0.1, "loss": float("nan")}, {"epoch": 2, "lr": 1e-05, "loss": 1 / 3}],
    [{"head": 0, "kind": "filter", "sigma": 0.0}, {"head": 1, "kind": "absolute", "sigma": 1e22, "more": True}],
    [{"x": np.float32(0.1), "y": np.float64(0.1), "n": np.int64(3)}],
])  # fmt: skip
def test_a_table_is_what_the_standard_library_writes(rows):
    """Where a value is missing in a row, `nan` stands for it too."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(k for row in rows for k in row), "nan", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    assert files.to_csv(rows).decode() == text.getvalue()


def test_tables_of_committed_records_are_written_again_to_the_byte():
    number = lambda text: int(text) if text.lstrip("-").isdigit() else float(text)
    word = lambda text: number(text) if set(text) <= set("0123456789.-+e") or text == "nan" else text
    paths = sorted(files.ROOT.glob("results/*/runs/*/*.csv"))
    assert paths
    for path in paths:
        rows = [{k: word(v) for k, v in row.items()} for row in csv.DictReader(io.StringIO(path.read_text()))]
        assert files.to_csv(rows) == path.read_bytes(), path


def test_result_is_written_last(record, tmp_path):
    """It marks a run as finished, so whatever fails before leaves none."""
    content = {name: (record.path / name).read_bytes() for name in FILES}
    for blocked in (*FILES, "run.json", "result.sha256", "result.json"):
        folder = tmp_path / blocked
        (folder / blocked).mkdir(parents=True)  # a file cannot take its place
        with pytest.raises(OSError):
            write_record(record.run, folder, record.result, content)
        assert not (folder / "result.json").is_file()
    assert {p.name for p in folder.iterdir()} == {*FILES, "run.json", "result.sha256", "result.json"}


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


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("weights.safetensors", "test.npz")])
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
        with pytest.raises(CorruptFile, match=f"{name} is damaged: .*trains the run again") as caught:
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
    sums = record.result["files"] | {"run.json": hashlib.sha256(path.read_bytes()).hexdigest()}
    files.write_sealed(record.path / "result.json", record.result | {"files": sums})


def test_a_changed_default_cannot_relabel_an_old_record(record):
    tamper(record, config=record.run.config | {"weight_decay": 1e-4, "gamma": 0.1})
    for read in (load, lambda run: ensure([run])):
        with pytest.raises(UserError, match=r"another gamma, weight_decay \(a default changed\): move it away"):
            read(record.run)
    assert state(record.run) == "damaged"


def test_a_record_from_before_a_field_is_still_good(record):
    tamper(record, config={k: v for k, v in record.run.config.items() if k != "holdout"})
    assert load(record.run).heads == record.heads


def test_another_protocol_is_refused(record):
    tamper(record, protocol=PROTOCOL + 1)
    with pytest.raises(UserError, match=f"protocol {PROTOCOL + 1}, this is {PROTOCOL}"):
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


@pytest.fixture(autouse=True)
def one_core(cores):
    """A worker for each core is then one worker of one thread."""
    cores(1)


def written(*paths):
    """When the files were written: equal if nothing was trained since."""
    return [path.stat().st_mtime_ns for path in paths]


def test_ensure_trains_once(tiny, results, capsys):
    a, b = (tiny(nets=("convnet12",), method="ind", epochs=1, seed=seed) for seed in (0, 1))
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    first = ensure([b, a, b], "small", workers=1)
    assert list(first) == [b, a]
    assert first[a].path == results / "small" / "runs" / a.key
    assert state(a) == state(b) == "done"
    names = {p.name for p in first[a].path.iterdir()} - {".lock"}
    assert names == {*first[a].result["files"], "result.json", "result.sha256"}
    assert (torch.get_num_threads(), signal.getsignal(signal.SIGINT)) == (threads, handler)
    before = written(*results.rglob("result.json"))
    second = ensure([a, b], "quick", workers=1)
    assert list(second) == [a, b]
    assert second[a].result == first[a].result
    assert written(*results.rglob("result.json")) == before


@pytest.mark.slow
def test_one_worker_takes_both_cores(tiny, cores, capsys):
    cores(2)
    run = tiny(nets=("convnet12",), method="ind", epochs=1)
    assert ensure([run], workers=1)[run].result["provenance"]["threads"] == processes.cpu_cores()
    assert torch.get_num_threads() == 1  # as before


def test_ensure_without_training_leaves_out_what_is_missing(record, tiny):
    missing = tiny(seed=9)
    assert list(ensure([missing, record.run], train=False)) == [record.run]
    assert state(missing) == "pending"
    flip(record.path / "result.json", 0)
    assert ensure([missing, record.run], train=False) == {}
    assert (state(missing), state(record.run)) == ("pending", "damaged")


def test_a_failing_run_does_not_stop_the_others(tiny, results, capsys):
    good = tiny(nets=("convnet12",), method="ind", epochs=1)
    bad = tiny(lr=1e6)  # the longer one is trained first
    with pytest.raises(UserError, match=r"1 of 2 runs failed, the first: .*not finite") as caught:
        ensure([good, bad], workers=1)
    assert "\n" not in str(caught.value)
    assert (state(good), state(bad)) == ("done", "failed")
    assert "not finite" in capsys.readouterr().err
    assert list(ensure([good, bad], train=False)) == [good]

    record, failed = find(good) / "result.json", results / "quick" / "runs" / bad.key / "failed.json"
    before = written(record, failed)
    with pytest.raises(UserError, match=r"failed before.*--retry"):
        ensure([good, bad], workers=1)
    assert written(record, failed) == before
    with pytest.raises(UserError, match="not finite"):
        ensure([good, bad], workers=1, retry=True)
    assert written(record) == before[:1] and written(failed) != before[1:]
    assert state(bad) == "failed"


def test_a_run_that_failed_can_succeed(tiny, results, capsys):
    run = tiny(nets=("convnet12",), method="ind", epochs=1)
    (folder := results / "quick" / "runs" / run.key).mkdir(parents=True)
    write_failure(folder, "a bad kernel")
    assert state(run) == "failed"
    (record,) = ensure([run], workers=1, retry=True).values()
    assert state(run) == "done"
    assert not (record.path / "failed.json").exists()


def test_missing_data_does_not_stop_the_others(tiny, data_folder, no_network, capsys):
    here = tiny(nets=("convnet12",), method="ind", epochs=1)
    with pytest.raises(MissingData, match="--profile quick"):
        ensure([Run("mnist", "convnet12", "ind", train_size=128), here], workers=1)
    assert state(here) == "done"


def test_data_that_must_be_prepared_are_not_run_and_no_failure(tiny, data_folder, capsys):
    here = tiny(nets=("convnet12",), method="ind", epochs=1)
    elsewhere = [
        Run("imagenet100", "msdnet_imagenet", method, stem="imagenet", augment="flip") for method in ("ind", "sila")
    ]
    assert list(ensure([*elsewhere, here], workers=1)) == [here]
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("2 of 3 runs not run: ") and "imagenet100 is not prepared" in line
    assert [state(run) for run in elsewhere] == ["pending"] * 2


@pytest.mark.slow
def test_two_workers_give_what_one_gives(tiny, comparable, tmp_path, cores, capsys):
    grid = [tiny(nets=("vgg13",) * 2, method=m, epochs=1, augment="crop+flip") for m in ("sila", "dml")]
    cores(2)  # one thread for each worker
    together = ensure(grid, workers=2, device="cpu")
    assert list(together) == grid
    for run in grid:
        alone = train(run, tmp_path / "alone" / run.key, "cpu")
        assert comparable(together[run]) == comparable(alone)
        assert together[run].result["provenance"]["threads"] == alone.result["provenance"]["threads"] == 1


def test_a_used_up_budget_stops_and_leaves_the_rest(tiny, capsys):
    grid = [tiny(seed=seed) for seed in (0, 1)]
    with pytest.raises(Stopped, match="stopped with 2 of 2 runs left; start again to go on"):
        ensure(grid, workers=1, budget=0.01)
    assert all(state(run) in ("pending", "started") for run in grid)


def test_a_budget_stops_within_a_run_and_it_goes_on_later(tiny, results, capsys):
    run, steps = tiny(epochs=10**6), []
    for _ in range(2):
        with pytest.raises(Stopped, match="1 of 1 runs left"):
            ensure([run], workers=1, budget=1)
        assert state(run) == "started"
        assert ensure([run], train=False) == {}
        path = results / "quick" / "runs" / run.key / "checkpoint.pt"
        steps.append(checkpoint.read_checkpoint(path, "cpu")["step"])
    assert 0 < steps[0] < steps[1]
    assert f"{run}: goes on after epoch {steps[0] / 2:.1f} of {run.epochs}" in capsys.readouterr().err


def test_a_signal_stops_after_the_step(tiny, usual_interrupt):
    def interrupted(run, folder, device, *, stop, **how):
        """Asked for the first time, after a step."""
        return trainer.train(run, folder, device, stop=lambda: signal.raise_signal(signal.SIGINT) or stop(), **how)

    run = tiny()
    with pytest.raises(Stopped, match="1 of 1 runs left"):
        train_all([run], "quick", "cpu", 1, train_by=interrupted)
    assert state(run) == "started"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_signal_acts_as_usual(usual_interrupt):
    with processes.interruptible() as stopped:
        assert not stopped.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stopped.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_after_a_stop_what_runs_is_waited_for_and_the_rest_is_cancelled():
    stopped, release, ticks = threading.Event(), threading.Event(), []

    def tick():
        ticks.append(release.set() if stopped.is_set() else stopped.set())

    with ThreadPoolExecutor(1) as pool:
        futures = {pool.submit(release.wait, 60): name for name in ("runs", "waits")}
        assert [(future.result(), name) for future, name in processes.finished(futures, stopped, tick)] == [
            (True, "runs")
        ]
    assert futures == {} and len(ticks) >= 2


def test_futures_may_be_added_and_a_loop_that_is_left_cancels_the_rest():
    stopped, release = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        futures, seen = {pool.submit(int): 0}, []
        for _, number in processes.finished(futures, stopped):
            seen.append(number)
            if number == 2:
                left = [pool.submit(release.wait, 60) for _ in range(9)]  # of which the last ones cannot have begun
                futures.update(dict.fromkeys(left))
                break
            futures[pool.submit(int)] = number + 1
        assert left[-1].cancelled()
        release.set()
    assert seen == [0, 1, 2]


def test_one_process_trains_a_run(tiny, results, capsys):
    run = tiny()
    folder = results / "quick" / "runs" / run.key
    with records.lock(folder, wait=lambda: True):
        assert state(run) == "running"
        said = []
        with pytest.raises(UserError, match="stopped while waiting"):
            with records.lock(folder, wait=lambda: False, message=said.append):
                pass
        assert said == ["another process is training this run: waiting for it"]
    assert state(run) == "pending"


def test_who_waited_finds_the_run_done(trained, results):
    """A second process that waited for the lock loads the record and does not train again."""
    run, source = trained
    folder = results / "quick" / "runs" / run.key

    def other_process():
        with records.lock(folder, wait=lambda: True):
            locked.set()
            time.sleep(0.2)
            shutil.copytree(source, folder, dirs_exist_ok=True)

    locked = threading.Event()
    thread = threading.Thread(target=other_process)
    thread.start()
    locked.wait(10)
    job = workers.Job(folder.parent, "cpu")
    outcome = job.train(run, lambda: False, lambda **_: None)
    thread.join()
    assert outcome.startswith("top-1 ")
    assert written(folder / "result.json") == written(source / "result.json")


def test_cost_counts_every_image():
    """Three forwards of each training image and one of each test image, in every epoch."""
    one = Run("digits", "mobilenet", "ind", epochs=1, train_size=128)
    assert estimate.cost(dataclasses.replace(one, epochs=5)) == 5 * estimate.cost(one)
    assert estimate.cost(one) * (3 * 256 + 500) == estimate.cost(dataclasses.replace(one, train_size=256)) * (
        3 * 128 + 500
    )
    pair = dataclasses.replace(one, nets=("mobilenet", "mobilenet"))
    assert estimate.cost(pair) == 2 * estimate.cost(one)


def test_load_reads_a_record_anywhere(trained):
    run, folder = trained
    assert load(run, folder).heads == json.loads((folder / "result.json").read_bytes())["heads"]


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_damaged_checkpoint_is_set_aside_and_the_run_starts_again(tiny, results, keep):
    run = tiny()
    folder = results / "quick" / "runs" / run.key
    with pytest.raises(Stopped):
        train(run, folder, "cpu", stop=lambda: "now")
    path = folder / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:keep])
    said = []
    record = train(run, folder, "cpu", progress=lambda **message: said.append(message.get("text")))
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
