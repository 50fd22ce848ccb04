"""One run on two processes, started by torchrun as a user does, against the same run in one process."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from shared_runs import BATCHES, NETWORKS, SMOOTH, UNEVEN

from silalib import launch, trainer
from silalib.errors import Damaged, UserError
from silalib.models import MODELS, count_parameters
from silalib.parallel import DATA, NETWORK, Ranks, layout
from silalib.paths import ROOT
from silalib.runs import CHECKPOINTS, Run, failure, load_folder

pytestmark = pytest.mark.slow  # processes that import torch, many times

BATCH, CLASSES = 16, 10


@pytest.fixture(autouse=True, scope="module")
def smooth_networks():
    with pytest.MonkeyPatch.context() as patch:
        for name, factory in SMOOTH.items():
            patch.setitem(MODELS, name, factory)
        yield


def torchrun(folder, *arguments):
    """The finished process, and what each of its two processes noted."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "SILALIB_RESULTS": str(folder),
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_ERROR_FILE": str(folder / "error.json"),
    }
    folder.mkdir(exist_ok=True)
    script = str(ROOT / "tests" / "shared_runs.py")
    done = subprocess.run(
        [*command, script, arguments[0], str(folder), *arguments[1:]], env=environment, capture_output=True, text=True
    )
    return done, [json.loads((folder / f"{rank}.json").read_bytes()) for rank in range(2)]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """(finished torchrun, notes of both processes, folder of the runs' records) of all shared runs."""
    folder = tmp_path_factory.mktemp("together")
    return *torchrun(folder, "all"), folder / "quick" / "runs"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """alone(run) -> its record, trained in this process."""
    folder, records = tmp_path_factory.mktemp("alone"), {}

    def train(run):
        if run not in records:
            records[run] = trainer.train(run, folder / run.key, "cpu")
        return records[run]

    return train


def assert_equal(record, expected, tolerance):
    numbers = lambda table: torch.tensor(
        table[[c for c in table.columns if "seconds" not in c]].select_dtypes("number").to_numpy(float)
    )
    torch.testing.assert_close(
        numbers(record.history), numbers(expected.history), rtol=tolerance, atol=tolerance, equal_nan=True
    )
    assert list(record.result["files"]) == list(expected.result["files"])
    assert list(record.test) == list(expected.test)
    for head, reference in zip(record.heads, expected.heads, strict=True):
        assert list(head) == list(reference)
        for name in ("network", "parameters", "macs"):
            assert head[name] == reference[name]
        assert head["nll"] == pytest.approx(reference["nll"], rel=tolerance)
        assert head["train_nll"] == pytest.approx(reference["train_nll"], rel=tolerance)
    if expected.run.noise_images:
        torch.testing.assert_close(numbers(record.noise), numbers(expected.noise), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NETWORKS)
def test_network_parallel_is_one_process(name, together, alone):
    run = NETWORKS[name]
    record = load_folder(run, together[2] / run.key)
    provenance = record.result["provenance"]
    assert (provenance["layout"], provenance["processes"]) == (NETWORK, 2)
    assert_equal(record, alone(run), 1e-5)


@pytest.mark.parametrize("name", BATCHES)
def test_data_parallel_is_one_process_with_the_whole_batch(name, together, alone):
    run = BATCHES[name]
    record = load_folder(run, together[2] / run.key)
    provenance = record.result["provenance"]
    assert (provenance["layout"], provenance["processes"]) == (DATA, 2)
    assert_equal(record, alone(run), 1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_process_holds_one_network(name, together):
    run = NETWORKS[name]
    for slot, seen in enumerate(together[1]):
        assert seen[run.key]["parameters"] == count_parameters(run.network(slot))


@pytest.mark.parametrize("name", NETWORKS)
def test_no_weight_or_gradient_crosses(name, together):
    """What goes through torch.distributed in a step: log-partitions, or logits where the loss is mutual."""
    run = NETWORKS[name]
    shape = [BATCH, CLASSES] if "dml" in run.method else [BATCH]
    for seen in together[1]:
        assert seen[run.key]["step"] == {f"all_gather torch.float32 {shape}": 1}


@pytest.mark.parametrize("name", [*NETWORKS, *BATCHES])
def test_bytes_are_counted_and_printed(name, together):
    done, notes, _ = together
    run = (NETWORKS | BATCHES)[name]
    parameters = sum(count_parameters(run.network(slot)) for slot in range(len(run.nets)))
    # ten BatchNorms of four channels: in the forward and in the backward pass, two vectors from each of two processes
    statistics = 2 * 10 * 2 * 2 * 4 * 4 * len(run.nets)
    expected = {
        "sila": {"log-partitions": 4 * BATCH},
        "unequal": {"log-partitions": 4 * BATCH},
        "dml": {"logits": 4 * BATCH * CLASSES},
        "sila+dml": {"logits": 4 * BATCH * CLASSES},
    }.get(name, {"BatchNorm statistics": statistics, "gradients": 4 * parameters}) | {"wishes to stop or save": 8}
    for seen in notes:
        steps = seen[run.key]["steps"]
        assert steps == 8
        assert seen[run.key]["sent"] == {kind: 8 * count for kind, count in expected.items()}
    printed = ", ".join(f"{kind} {count:,}" for kind, count in expected.items())
    assert f"{run}: each process sent in a step: {printed} bytes" in done.stderr


def test_the_layout_is_named_and_the_first_process_alone_talks(together):
    done, _, _ = together
    for run in (*NETWORKS.values(), *BATCHES.values()):
        named = f"{run}: {NETWORK if run in NETWORKS.values() else DATA} on 2 processes"
        assert done.stderr.count(named) == 1
        assert sum("runs, " in line and f"{run}: top-1" in line for line in done.stderr.splitlines()) == 1


def test_a_batch_that_cannot_be_split_fails_alone(together):
    done, _, folder = together
    assert done.returncode == 1  # torchrun's own, whatever its processes return
    message = "a batch of 15 cannot be split evenly over 2 processes: use fewer"
    assert f"1 of 7 runs failed, the first: {UNEVEN}: {message}" in done.stderr
    assert not (folder / UNEVEN.key / "result.json").exists()
    with pytest.raises(UserError, match=message):
        layout(UNEVEN, 2)


def test_the_layout_that_fits():
    pair, three = Run(), Run(nets=("resnet18",) * 3)
    assert layout(pair, 2) == layout(three, 3) == NETWORK
    assert layout(pair, 4) == layout(three, 2) == layout(Run(nets=("resnet18",), method="ind"), 2) == DATA


def test_a_signal_to_one_process_stops_all_and_both_layouts_go_on(together, alone, tmp_path):
    networks, batches = NETWORKS["sila"], BATCHES["one network"]
    done, notes = torchrun(tmp_path, "two", "5")
    assert "stopped with 2 of 2 runs left; start again to go on" in done.stderr
    assert [seen[networks.key]["steps"] for seen in notes] == [6, 6]
    folder = tmp_path / "quick" / "runs"
    assert {p.name for p in (folder / networks.key).glob("*.pt")} == {"checkpoint.pt", "checkpoint.1-6.pt"}
    assert {p.name for p in (folder / batches.key).glob("*.pt")} == {"checkpoint.pt"}

    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"was written by torchrun --nproc-per-node 2: go on like that, or delete it"):
        trainer.train(networks, elsewhere / networks.key, "cpu")
    # a part of the batches is no other state than one process has
    assert_equal(trainer.train(batches, elsewhere / batches.key, "cpu"), alone(batches), 1e-4)

    ranks = Ranks()
    ranks.layout, ranks.rank, ranks.size = NETWORK, 1, 2
    ranks.from_first = lambda _: (elsewhere / networks.key / "checkpoint.pt", 6)
    own = elsewhere / networks.key / "checkpoint.1-6.pt"
    own.write_bytes(own.read_bytes()[:-1])
    with pytest.raises(Damaged, match=r"checkpoint.1-6.pt is damaged: delete checkpoint\*.pt beside it"):
        trainer.train(networks, elsewhere / networks.key, "cpu", ranks=ranks)

    latest, previous = (folder / batches.key / name for name in CHECKPOINTS)
    latest.replace(previous)
    latest.write_bytes(b"damaged")
    done, notes = torchrun(tmp_path, "two")
    assert done.returncode == 0, done.stderr
    assert [seen[networks.key]["first"] for seen in notes] == [6, 6]
    assert [seen[batches.key]["first"] for seen in notes] == [1, 1]
    assert latest.with_name("checkpoint.pt.corrupt").read_bytes() == b"damaged"
    assert not list(folder.glob("*/*.pt"))
    for run in (networks, batches):
        record = load_folder(run, folder / run.key)
        assert_equal(record, load_folder(run, together[2] / run.key), 0)
        assert record.read("weights.safetensors") == (together[2] / run.key / "weights.safetensors").read_bytes()


@pytest.mark.parametrize("environment, closing", [({}, "closing\n"), ({"TORCHELASTIC_RUN_ID": "none"}, "")])
def test_one_of_torchruns_processes_ends_before_python_closes_down(environment, closing):
    """Where Python closes down, what is registered with atexit is called; what was printed must not be lost."""
    script = (
        "import atexit; from silalib.__main__ import leave; atexit.register(print, 'closing'); print('end'); leave(3)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "end\n" + closing)


@pytest.fixture
def one_of_two(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_workers_are_refused(one_of_two, tmp_path):
    with pytest.raises(UserError, match="leave out --workers"):
        launch.train_all([NETWORKS["sila"]], tmp_path, "cpu", 2, None, False, False)


def test_an_unknown_error_ends_the_process_for_which_others_may_wait(one_of_two, results, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bad kernel")

    monkeypatch.setattr(launch.torchrun, "train", fail)
    run, folder = NETWORKS["sila"], results / "quick" / "runs"
    job = launch.Job(folder, "cpu", 1, None, False, False)
    with pytest.raises(SystemExit, match="RuntimeError: a bad kernel"):
        launch.attempt(job, run, lambda: False, lambda **_: None)
    assert "in fail" in failure(run)["traceback"]
