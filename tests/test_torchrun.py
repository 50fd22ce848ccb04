"""One run on two processes, started by torchrun as a user does, against the same run in one process."""

import json
import os
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import train
from shared_runs import ALONE, NETWORKS, SMOOTH

from silalib.errors import CorruptFile, UserError
from silalib.files import ROOT
from silalib.launch import workers
from silalib.launch.ensure import ensure
from silalib.models import MODELS, count_parameters
from silalib.records import failure, load
from silalib.training import trainer
from silalib.training.network_parallel import Ranks

pytestmark = pytest.mark.slow  # processes that import torch, many times

BATCH, CLASSES = 16, 10


@pytest.fixture(autouse=True, scope="module")
def smooth_networks():
    with mock.patch.dict(MODELS, SMOOTH):
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

    def once(run):
        if run not in records:
            records[run] = train(run, folder / run.key)
        return records[run]

    return once


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
    record = load(run, together[2] / run.key)
    provenance = record.result["provenance"]
    assert (provenance["layout"], provenance["processes"]) == ("network-parallel", 2)
    assert_equal(record, alone(run), 1e-5)


def test_a_run_of_another_number_of_networks_is_trained_by_the_first_process_alone(together, alone):
    done, notes, folder = together
    record = load(ALONE, folder / ALONE.key)
    assert (record.result["provenance"]["layout"], record.result["provenance"]["processes"]) == (None, 1)
    assert_equal(record, alone(ALONE), 0)
    assert [ALONE.key in seen for seen in notes] == [True, False]
    assert f"{ALONE}: 1 of 2 processes are needed: the first one trains it alone" in done.stderr


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


def test_the_first_process_alone_talks(together):
    done, notes, _ = together
    assert done.returncode == 0, done.stderr
    for run in NETWORKS.values():
        assert [seen[run.key]["steps"] for seen in notes] == [8, 8]
        assert done.stderr.count(f"{run}: network-parallel on 2 processes") == 1
        assert sum("runs, " in line and f"{run}: top-1" in line for line in done.stderr.splitlines()) == 1


def test_more_processes_than_networks_are_refused_in_one_line(tmp_path):
    done, notes = torchrun(tmp_path, "alone")
    message = "torchrun started 2 processes, but no run here has more than 1 network: use --nproc-per-node 1"
    assert done.stderr.count(f"silalib: error: {message}\n") == 1
    assert notes == [{}, {}] and not (tmp_path / "quick").exists()


def test_a_signal_to_one_process_stops_all_and_they_go_on(together, tmp_path):
    run, next_run = NETWORKS["sila"], NETWORKS["dml"]
    done, notes = torchrun(tmp_path, "two", "5")
    assert "stopped with 2 of 2 runs left; start again to go on" in done.stderr
    assert [seen[run.key]["steps"] for seen in notes] == [6, 6]
    folder = tmp_path / "quick" / "runs"
    assert {p.name for p in (folder / run.key).glob("*.pt")} == {"checkpoint.pt", "checkpoint.1-6.pt"}
    assert {p.name for p in (folder / next_run.key).glob("*.pt")} == {"checkpoint.pt", "checkpoint.1-1.pt"}

    elsewhere = shutil.copytree(folder / run.key, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"was written by torchrun --nproc-per-node 2: go on like that, or delete it"):
        trainer.train(run, elsewhere, "cpu")
    ranks = Ranks()
    ranks.parallel, ranks.rank, ranks.size = True, 1, 2
    ranks.gather = lambda _: [6]
    own = elsewhere / "checkpoint.1-6.pt"
    own.write_bytes(own.read_bytes()[:-1])
    with pytest.raises(CorruptFile, match=r"checkpoint.1-6.pt is damaged: delete checkpoint\*.pt beside it"):
        trainer.train(run, elsewhere, "cpu", ranks=ranks)

    done, notes = torchrun(tmp_path, "two")
    assert done.returncode == 0, done.stderr
    assert [seen[run.key]["first"] for seen in notes] == [6, 6]
    assert [seen[next_run.key]["first"] for seen in notes] == [1, 1]
    assert not list(folder.glob("*/*.pt"))
    for each in (run, next_run):
        record, whole = (load(each, place / each.key) for place in (folder, together[2]))
        assert_equal(record, whole, 0)
        assert record.read("weights.safetensors") == whole.read("weights.safetensors")


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
def one_of_two():
    with mock.patch.dict(os.environ, TORCHELASTIC_RUN_ID="here", WORLD_SIZE="2"):
        yield


def test_workers_are_refused(one_of_two):
    with pytest.raises(UserError, match="leave out --workers"):
        ensure([NETWORKS["sila"]], device="cpu", workers=2)


def test_an_unknown_error_ends_the_process_for_which_others_may_wait(one_of_two, results):
    def fail(*_, **__):
        raise RuntimeError("a bad kernel")

    run = NETWORKS["sila"]
    job = workers.Job(results / "quick" / "runs", "cpu", train_by=fail)
    with pytest.raises(SystemExit, match="RuntimeError: a bad kernel"):
        workers.attempt(job, run, lambda: False, lambda **_: None)
    assert "in fail" in failure(run)["traceback"]
