"""Faults, really made: killed processes, corrupted files, races, full disks, and every mistake a user can make."""

import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import killable
import numpy as np
import pytest
import torch
from conftest import train
from test_data import write_mnist

from silalib import data, experiments, files, records
from silalib.__main__ import main
from silalib.analysis import tables
from silalib.data import DATASETS
from silalib.errors import CorruptFile, MissingData, NoRoom, Stopped, UserError
from silalib.files import ROOT, quarantine
from silalib.launch.ensure import ensure, train_all
from silalib.losses import siamese_labels
from silalib.records import damage, failure, find, folders, load, state, write_record
from silalib.report import build, pages
from silalib.run import Run
from silalib.training import checkpoint, trainer

SEED = random.randrange(2**32)
"""Other faults at every run of the tests; a failure shows it."""


@pytest.fixture(scope="module")
def processes():
    """Forks processes in which everything is loaded: processes(function, *arguments) -> a started process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(ROOT), *filter(None, [before])])
    started = []

    def start(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        started.append(process)
        return process

    start.context = context
    first = start(time.sleep, 0)
    os.environ.pop("PYTHONPATH")
    if before:
        os.environ["PYTHONPATH"] = before
    first.join()
    yield start
    for process in started:
        process.kill()
        process.join()


def steps(log):
    """The steps that processes have done, as (seed, step)."""
    return [tuple(map(int, line.split())) for line in log.read_text().splitlines()] if log.exists() else []


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- kills


CHANGES = {"epochs": 3, "augment": "crop+flip"}


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_run_ends_as_if_nothing_had_been(
    kills, processes, tiny, comparable, tmp_path, counts, capsys
):
    whole = comparable(train(tiny(**CHANGES), tmp_path / "whole"))
    began = time.monotonic()
    processes(killable.train, tmp_path / "timed", tmp_path / "timed.log", CHANGES).join()
    seconds, chance, survived, attempt = time.monotonic() - began, random.Random(SEED), 0, 0
    while survived < kills:
        folder, log, attempt = tmp_path / f"run{attempt}", tmp_path / f"run{attempt}.log", attempt + 1
        while True:
            saved = [
                checkpoint.read_checkpoint(folder / n, "cpu") for n in checkpoint.CHECKPOINTS if (folder / n).exists()
            ]
            saved = saved[0]["step"] if saved else 0
            before = len(steps(log))
            assert before == 0 or saved >= steps(log)[-1][1]  # no more is lost than the last step
            process = processes(killable.train, folder, log, CHANGES)
            end = survived >= kills
            process.join(None if end else chance.uniform(0, seconds))
            process.kill()
            process.join()
            done = [step for _, step in steps(log)[before:]]
            assert done == list(range(saved, saved + len(done))), SEED  # only what is left
            if process.exitcode != 0:
                assert process.exitcode == -signal.SIGKILL
                survived += 1
                counts["kills survived"] += 1
            if (folder / "result.json").exists():
                break
        assert comparable(load(tiny(**CHANGES), folder)) == whole, SEED
        with records.lock(folder):  # which removes what a killed process was writing
            assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_command_with_75(number, processes, tmp_path, capsys):
    log, results = tmp_path / "log", tmp_path / "results"
    arguments = (["train", "tiny", "--workers", "1"], str(results), log, {"epochs": 10000})
    process = processes(killable.command, *arguments)
    wait_for(lambda: len(steps(log)) > 2)
    os.kill(process.pid, number)
    process.join()
    error = Path(f"{log}.err").read_text()
    assert process.exitcode == 75
    assert "stopped with 3 of 3 runs left; start again to go on" in error and "Traceback" not in error
    (path,) = results.rglob("checkpoint.pt")
    assert checkpoint.read_checkpoint(path, "cpu")["step"] == steps(log)[-1][1] + 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_an_interrupt_during_the_imports_is_no_traceback(tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-m", "silalib", "status"], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        wait_for(lambda maps=Path(f"/proc/{process.pid}/maps"): "libtorch_cpu" in maps.read_text())
        process.send_signal(number)
        _, error = process.communicate()
        assert (process.returncode, error) == (75, "silalib: interrupted; start again to go on\n")


# -- two processes


def test_two_processes_train_each_run_once(processes, tmp_path, results, capsys):
    arguments = ["train", "tiny", "--workers", "1"]
    logs = [tmp_path / name for name in "ab"]
    racing = [processes(killable.command, arguments, str(results), log, {}) for log in logs]
    for process in racing:
        process.join()
    assert [process.exitcode for process in racing] == [0, 0]
    done = [entry for log in logs for entry in steps(log)]
    assert sorted(done) == [(seed, step) for seed in range(3) for step in range(4)]
    assert len(list(results.rglob("result.json"))) == 3


def test_the_lock_of_a_dead_process_is_free(processes, tiny, results):
    run, ready = tiny(), processes.context.Event()
    folder = results / "quick" / "runs" / run.key
    process = processes(killable.hold, folder, ready)
    assert ready.wait(120) and state(run) == "running"
    with pytest.raises(Stopped), records.lock(folder):
        pass
    (folder / ".checkpoint.pt.1.tmp").write_bytes(b"half")
    process.kill()
    process.join()
    with records.lock(folder):
        assert not (folder / ".checkpoint.pt.1.tmp").exists()
    assert state(run) == "pending"


# -- full disks


def test_a_full_disk_stops_all_with_one_line_and_leaves_what_was_there(
    processes, tiny, comparable, results, tmp_path, capsys
):
    run, asked = tiny(), iter(range(9))
    folder = results / "quick" / "runs" / run.key
    with pytest.raises(Stopped):
        trainer.train(run, folder, "cpu", stop=lambda: next(asked) == 2)
    before = (folder / "checkpoint.pt").read_bytes()
    log = tmp_path / "log"
    process = processes(killable.command, ["train", "tiny", "--workers", "1"], str(results), log, {}, 10000)
    process.join()
    assert process.exitcode == 1
    error = Path(f"{log}.err").read_text()
    assert (
        "Traceback" not in error and error.count("make room and start again to go on") == 2
    )  # as it fails, at the end
    assert error.splitlines()[-1].startswith("silalib: error: 1 of 3 runs failed, the first: cannot write")
    assert steps(log) == [(0, 3)]  # nothing else was trained
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not list(results.rglob("*.tmp"))
    assert comparable(train(run, folder)) == comparable(train(run, tmp_path / "whole"))


# -- corruption


def corrupted(content, chance):
    """Other bytes: a flipped bit, some overwritten, cut off, empty, or longer."""
    while True:
        at, kind = chance.randrange(len(content)), chance.randrange(5)
        changed = bytearray(content)
        if kind == 0:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[at : at + 16] = chance.randbytes(len(changed[at : at + 16]))
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            changed.clear()
        else:
            changed += chance.randbytes(16)
        if changed != content:
            return bytes(changed)


def refused(error, kind=CorruptFile):
    assert isinstance(error, kind), error
    assert "\n" not in str(error)
    return True


@pytest.fixture
def corruptible(record, data_folder, no_network, tmp_path, capsys):
    """Name of a file -> (its path, what finds the damage), for every kind of file that is loaded."""

    def of_record():
        assert state(record.run) == "damaged"
        return refused(damage(record.run))

    kinds = {name: (record.path / name, of_record) for name in (*record.result["files"], "result.json")}
    kinds["result.sha256"] = (record.path / "result.sha256", of_record)

    with pytest.raises(Stopped):
        trainer.train(record.run, tmp_path / "started", "cpu", stop=lambda: "now")
    started = tmp_path / "started" / "checkpoint.pt"

    def of_checkpoint():
        with pytest.raises(CorruptFile) as caught:
            checkpoint.read_checkpoint(started, "cpu")
        return refused(caught.value)

    kinds["checkpoint.pt"] = (started, of_checkpoint)

    write_mnist(data_folder)
    names = ("mnist", "cifar100")
    unknown = {name: replace(DATASETS[name], sha256=None) for name in names}
    with made_up_cifar(data_folder), mock.patch.dict(DATASETS, unknown):
        DATASETS.update({name: replace(DATASETS[name], sha256=data.load(name).checksum) for name in names})
        for name in names:
            folder = data_folder / DATASETS[name].folder

            def of_published(name=name, folder=folder):
                data.load.cache_clear()
                with pytest.raises(MissingData, match=r"is damaged \(it is now .*\.corrupt\): put") as caught:
                    data.load(name)
                aside = folder.with_name(f"{folder.name}.corrupt")
                aside.replace(folder)
                return refused(caught.value, MissingData)

            for path in folder.iterdir():
                kinds[path.name] = (path, of_published)
        yield kinds


@contextmanager
def made_up_cifar(data_folder):
    """Files in CIFAR-100's format, and meanwhile their MD5s in place of the published ones."""
    from hashlib import md5

    from silalib.data._torchvision import torchvision

    folder, made = data_folder / DATASETS["cifar100"].folder, torchvision.datasets.CIFAR100
    folder.mkdir(parents=True)
    contents = {
        "train": {"data": np.full((4, 3072), 7, np.uint8), "fine_labels": [5, 99, 0, 7]},
        "test": {"data": np.full((3, 3072), 9, np.uint8), "fine_labels": [1, 2, 3]},
        "meta": {"fine_label_names": [str(i) for i in range(100)]},
    }
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = md5((folder / name).read_bytes()).hexdigest()
    lists = {f"{name}_list": [[name, sums[name]]] for name in ("train", "test")}
    with mock.patch.multiple(made, **lists, meta=made.meta | {"md5": sums["meta"]}):
        yield


@pytest.mark.parametrize("each", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_corruption_is_found_in_every_kind_of_file(each, corruptible, counts, capsys):
    assert len(corruptible) > 14
    chance = random.Random(SEED)
    for name, (path, found) in corruptible.items():
        good = path.read_bytes()
        for _ in range(each):
            path.write_bytes(corrupted(good, chance))
            assert found(), (name, SEED)
            counts["corruptions found"] += 1
            path.write_bytes(good)


def test_what_is_damaged_is_set_aside_and_the_run_unfinished(record):
    for name in (*record.result["files"], "result.json", "result.sha256"):
        good = {path.name: path.read_bytes() for path in record.path.iterdir()}
        (record.path / name).write_bytes(b"")
        quarantine(damage(record.run))
        assert find(record.run) is None and (record.path / f"{name}.corrupt").read_bytes() == b""
        for left in record.path.glob("*.corrupt"):
            left.unlink()
        for path, content in good.items():
            (record.path / path).write_bytes(content)
        assert state(record.run) == "done"


def test_settings_that_were_changed_are_damage_not_another_default(record):
    path = record.path / "run.json"
    path.write_bytes(path.read_bytes().replace(b"convnet12", b"convnet13"))
    refused(damage(record.run))


def test_a_damaged_page_counts_as_not_built(results):
    folder = results / "quick" / "report"
    folder.mkdir(parents=True)
    report, contents = pages.Report("quick"), [b"", b"\xff\xfe", b'<meta name="card" content="{">', b"<p>nothing</p>"]
    damaged = [folder / f"{stem}.html" for stem in list(report.notebooks)[: len(contents)]]
    for path, content in zip(damaged, contents):
        path.write_bytes(content)
    report.write_index()
    assert all("has not been built" in path.read_text() for path in damaged)


def test_errors_come_back_from_a_worker_process(tiny, tmp_path):
    for error in (
        CorruptFile(tmp_path, "mend it"),
        trainer.Diverged(tiny(), 1, 2, 0.1),
        NoRoom("full"),
        Stopped("now"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error)
        assert again._render_traceback_() == [f"{type(error).__name__}: {error}"]


@pytest.mark.parametrize("both", [False, True])
def test_a_damaged_checkpoint_leaves_the_one_before_it(both, tiny, comparable, tmp_path):
    run, folder, asked = tiny(epochs=3), tmp_path / "run", iter(range(9))
    with pytest.raises(Stopped):
        trainer.train(run, folder, "cpu", stop=lambda: next(asked) == 4, checkpoint_seconds=-1)
    damaged = [folder / name for name in checkpoint.CHECKPOINTS[: 1 + both]]
    for path in damaged:
        path.write_bytes(corrupted(path.read_bytes(), random.Random(SEED)))
    done, said = [], []
    noted = killable.noting(lambda run, step: done.append(step))
    record = write_record(run, folder, *noted(run, folder, "cpu", progress=lambda text=None, **_: said.append(text)))
    assert done == list(range(0 if both else 4, 6))
    assert [path.with_name(f"{path.name}.corrupt").exists() for path in damaged] == [True] * len(damaged)
    assert len([text for text in said if text]) == len(damaged)
    assert comparable(record) == comparable(train(run, tmp_path / "whole"))


def test_nothing_that_is_loaded_can_execute_code(record, data_folder, no_network, tmp_path, capsys):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    folder = data_folder / DATASETS["cifar100"].folder
    folder.mkdir(parents=True)
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(pickle.dumps({"data": Harm()}))
    with pytest.raises(MissingData):
        data.load("cifar100")
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(checkpoint.checkpoint_bytes({"step": Harm()}))  # with the right checksum
    with pytest.raises(CorruptFile):
        checkpoint.read_checkpoint(path, "cpu")
    arrays = files.to_npz({"labels": np.array([Harm()], dtype=object)})
    (record.path / "test.npz").write_bytes(arrays)
    record.result["files"]["test.npz"] = files.sha256(arrays)
    with pytest.raises(CorruptFile, match=r"test\.npz"):
        records.validate(records.Record(record.run, record.path, record.result))
    assert not (tmp_path / "harmed").exists()


def test_other_data_are_refused(record, tiny, tmp_path):
    with mock.patch.dict(DATASETS, digits=replace(DATASETS["digits"], sha256="0" * 64)):
        with pytest.raises(UserError, match="was trained on other data than digits is here: move it away"):
            records.load(record.run)
    with pytest.raises(Stopped):
        trainer.train(tiny(), tmp_path, "cpu", stop=lambda: "now")
    path = tmp_path / "checkpoint.pt"
    saved = checkpoint.read_checkpoint(path, "cpu") | {"data_sha256": "0" * 64}
    path.write_bytes(checkpoint.checkpoint_bytes(saved))
    with pytest.raises(UserError, match="was trained on other data than digits is here: delete it"):
        trainer.train(tiny(), tmp_path, "cpu")


def test_a_record_without_its_own_checksum_is_of_an_earlier_time(record):
    """Then only the checksums that it has are compared; where they are, they hold for run.json too."""
    path = record.path / "result.json"
    sums = {name: sum for name, sum in record.result["files"].items() if name != "run.json"}
    path.write_bytes(files.to_json(record.result | {"files": sums}))
    (record.path / "result.sha256").unlink()
    assert state(record.run) == "done"
    sums = "".join(f"{files.sha256((record.path / n).read_bytes())}  {n}\n" for n in ("run.json", "result.json"))
    (record.path / "result.sha256").write_text(sums)
    assert state(record.run) == "done"
    for name in ("run.json", "result.json"):
        good = (record.path / name).read_bytes()
        (record.path / name).write_bytes(good + b" ")
        assert state(record.run) == "damaged"
        (record.path / name).write_bytes(good)


def test_a_run_that_goes_on_elsewhere_says_where_it_was(tiny, tmp_path):
    with pytest.raises(Stopped):
        trainer.train(tiny(), tmp_path, "cpu", stop=iter([None, "now"]).__next__)
    path = tmp_path / "checkpoint.pt"
    state = checkpoint.read_checkpoint(path, "cpu")
    state["parts"][0]["device"] = "another one (AVX)"
    path.write_bytes(checkpoint.checkpoint_bytes(state))
    provenance = train(tiny(), tmp_path).result["provenance"]
    assert [part["from_step"] for part in provenance["parts"]] == [0, 2]
    assert provenance["device"] == provenance["parts"][1]["device"] != "another one (AVX)"
    assert provenance["parts"][0]["device"] == "another one (AVX)"


# -- runs that fail


@pytest.fixture
def exhibit(tiny, plan, cores):
    """An exhibit of two seeds, in this process, on one core; exhibit(**changes of both)."""
    cores(1)

    def make(**changes):
        grid = lambda profile="quick", seeds=None: [tiny(**changes | {"seed": seed}) for seed in seeds or (0, 1)]
        plan(grid)
        experiments.EXHIBITS["tiny"] = replace(experiments.EXHIBITS["tiny"], notebook="00_tiny")
        return grid()

    return make


def test_a_run_that_diverged_is_shown_with_epoch_step_and_rate(tiny, exhibit, capsys):

    bad, good = exhibit(lr=1e6)[0], tiny(method="ind", nets=("convnet12",))
    assert main(["train", "tiny", "--workers", "1"]) == 1
    assert state(bad) == "failed"
    assert {key: failure(bad)[key] for key in ("epoch", "step", "lr")} == {"epoch": 1, "step": 2, "lr": 1e6}
    where = "epoch 1, step 2, lr 1e+06"
    capsys.readouterr()
    assert main(["status", "tiny"]) == 0
    assert f"not finite in {where} (--retry trains it again)" in capsys.readouterr().out
    frame = tables.over_seeds([bad, good], {}, ["top1"])
    table = tables.comparison(frame, ["top1"]).to_string()
    assert table.count(f"(seed 0 failed: {where})") == 2 and table.count("not run") == 1  # two networks, and `good`
    assert main(["train", "tiny", "--workers", "1"]) == 1
    assert "failed before" in capsys.readouterr().err
    (path := folders(bad)[0] / "failed.json").write_bytes(b"{")
    assert "is damaged" in failure(bad)["error"] and path.exists()


def train_by(function, runs):
    """As `ensure` trains them, in this process, with another training."""
    train_all(runs, "quick", "cpu", 1, train_by=function)


def test_any_error_of_a_run_ends_that_run_alone(exhibit, capsys):
    def fail(run, *rest, **more):
        if run.seed == 0:
            raise RuntimeError("a bad kernel\nand more")
        return trainer.train(run, *rest, **more)

    grid = exhibit()
    with pytest.raises(
        UserError, match=r"1 of 2 runs failed, the first: .* RuntimeError: a bad kernel \(an internal err"
    ):
        train_by(fail, grid)
    assert [state(run) for run in grid] == ["failed", "done"]
    error = capsys.readouterr().err
    assert "RuntimeError: a bad kernel" in error and "and more" not in error and "Traceback" not in error
    assert "in fail" in failure(grid[0])["traceback"]
    assert main(["train", "tiny", "--workers", "1", "--retry"]) == 0


def test_out_of_gpu_memory_names_the_batch_size(exhibit, capsys):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nSee the documentation")

    with pytest.raises(UserError, match="out of GPU memory at batch size 32: use fewer --workers or --device cpu"):
        train_by(fail, exhibit())


@pytest.fixture
def no_pages():
    with mock.patch.object(build, "build", return_value=0):
        yield


def test_without_training_a_damaged_record_is_told_by_the_exit_status(exhibit, no_pages, capsys):
    (run, _) = exhibit()
    assert main(["train", "tiny", "--workers", "1"]) == 0
    assert main(["report", "tiny", "--no-train"]) == 0
    (find(run) / "test.npz").write_bytes(b"")
    capsys.readouterr()
    assert main(["status", "tiny"]) == 0
    assert f"damaged: {find(run) / 'test.npz'} is damaged" in capsys.readouterr().out
    assert main(["report", "tiny", "--no-train"]) == 1
    assert capsys.readouterr().err.endswith("silalib: error: 1 of 2 runs with a damaged record, see `status`\n")
    assert (find(run) / "test.npz").read_bytes() == b""
    assert main(["report", "tiny", "--workers", "1"]) == 0
    assert (find(run) / "test.npz.corrupt").exists()


@pytest.mark.slow
def test_a_kernel_that_dies_is_a_failed_page_and_the_rest_is_built(results, tmp_path, capsys):
    from nbformat import v4, write

    folder = tmp_path / "notebooks"
    folder.mkdir()
    names = [("00_siamese_labels", "import os\nos.kill(os.getpid(), 9)"), ("09_claims", "print(6 * 7)")]
    for stem, source in names:
        parameters = 'profile = "quick"\nseeds = None\ndevice = "auto"\nworkers = None\ntrain = True'
        cells = [v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), v4.new_code_cell(source)]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"{stem}.ipynb")
    assert build.build("quick", train=False, folder=folder, exhibits={}) == 1
    dead, alive = ((results / "quick" / "report" / f"{stem}.html").read_text() for stem, _ in names)
    assert "could not be built" in dead and "DeadKernelError" in dead
    assert "42" in alive and "could not be built" not in alive
    assert "DeadKernelError" in (results / "quick" / "report" / "index.html").read_text()


# -- bad input


@pytest.mark.parametrize(
    "code, arguments, message",
    [
        (2, "train table9", "invalid choice: 'table9' (choose from"),
        (2, "report fig9", "invalid choice: 'fig9' (choose from"),
        (2, "status table9", "invalid choice: 'table9' (choose from"),
        (2, "train table1 --profile huge", "invalid choice: 'huge' (choose from"),
        (2, "report --profile huge", "invalid choice: 'huge' (choose from"),
        (2, "fly", "invalid choice: 'fly' (choose from"),
        (2, "", "the following arguments are required: command"),
        (2, "train", "the following arguments are required: EXHIBIT"),
        (2, "train table1 --fast", "unrecognized arguments: --fast"),
        (2, "train table1 --seeds -1", "'-1' is not a whole number from 0"),
        (2, "train table1 --seeds 1.5", "'1.5' is not a whole number from 0"),
        (2, "train table1 --seeds", "--seeds: expected at least one argument"),
        (2, "train table1 --workers 0", "'0' is not a whole number from 1"),
        (2, "train table1 --workers -3", "'-3' is not a whole number from 1"),
        (2, "train table1 --budget 0", "'0' is no duration: use 90s, 9m or 1.5h"),
        (2, "train table1 --budget=-9m", "'-9m' is no duration: use 90s, 9m or 1.5h"),
        (2, "data folder", "'folder' needs --from DIR, --name and --size"),
        (2, "data mnist --from x", "--from belongs to 'imagenet100' and 'folder'"),
        (2, "data folder --from x --name y --size 0", "'0' is not a whole number from 1"),
        (1, "train table1 --device tpu", "unknown device 'tpu': use auto, cpu, cuda or cuda:N"),
        (1, "train table1 --device cuda:99", "is not here"),
        (1, "data cifar", "unknown data set 'cifar': choose from digits"),
        (1, "data folder --from nowhere --name y --size 32", "nowhere is not a folder: give the one that holds train/"),
        (1, "data imagenet100", "python -m silalib data imagenet100 --from DIR"),
        (1, "data mnist", "is missing: put MNIST there"),
        (1, "train fig6 --profile paper --workers 1", "is missing: put MNIST there, or use --profile quick"),
    ],
)
def test_bad_arguments_are_one_line(code, arguments, message, data_folder, no_network, counts, capsys):
    try:
        status = main(arguments.split())
    except SystemExit as error:
        status = error.code
    error = capsys.readouterr().err
    assert status == code
    assert message in error and error.startswith(("silalib: error: ", "python -m silalib")) and error.count("\n") == 1
    counts["inputs refused"] += 1


BAD = {
    "a bare run": (lambda run: ensure(run), "takes a list of runs: ensure([run])"),
    "a name": (lambda run: ensure(["table1"]), "takes a list of runs"),
    "profile": (lambda run: ensure([run], "huge"), "unknown profile 'huge': choose from quick, small, short, paper"),
    "workers": (lambda run: ensure([run], workers="two"), "workers must be a whole number from 1, or None, not 'two'"),
    "budget": (lambda run: ensure([run], budget=-1), "budget must be a number of seconds above 0, or None, not -1"),
    "device": (lambda run: ensure([run], device=None), "unknown device None"),
    "no GPU": (lambda run: ensure([run], device="cuda:99"), "is not here"),
    "seeds": (lambda run: experiments.table1("quick", seeds=3), "seeds 3: give a list of whole numbers from 0"),
    "network": (lambda run: Run(nets=("alexnet",) * 2), "unknown network 'alexnet': choose from mobilenet"),
    "method": (lambda run: Run(method="kd"), "unknown method 'kd': choose from ind, sila"),
    "width": (lambda run: replace(run, width=-1), "width must be above 0, not -1"),
    "width, absurd": (lambda run: replace(run, width=1e9), "width must be at most 100, not 1000000000.0"),
    "rate": (lambda run: replace(run, lr=float("nan")), "lr must be a finite number, not nan"),
    "batch": (lambda run: replace(run, batch_size=10**9), "train_size 64 is below the batch size 1000000000"),
    "subset": (lambda run: ensure([replace(run, train_size=10**9)], workers=1), "digits has 1297 images"),
    "betas": (lambda run: replace(run, betas=(1, 2, 3)), "3 betas for 2 networks: give one each"),
    "betas of a loss": (
        lambda run: siamese_labels([torch.ones(2, 3)], torch.tensor([0, 1]), betas=[1, 2]),
        "2 betas for 1",
    ),
    "no logits": (lambda run: siamese_labels([], torch.tensor([0])), "no logits: give a list with one tensor"),
    "classes": (
        lambda run: siamese_labels([torch.ones(2, 3), torch.ones(2, 4)], torch.tensor([0, 1])),
        "every head needs the same (batch, classes, ...)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_one_line(case, tiny, counts, capsys):
    call, message = BAD[case]
    with pytest.raises((UserError, ValueError)) as caught:
        call(tiny())
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError) or "siamese" in repr(call.__code__.co_names)
    counts["inputs refused"] += 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write")
def test_a_read_only_results_folder_is_one_line(exhibit, counts, capsys):
    exhibit()
    for arguments in (["train", "tiny", "--workers", "1"], ["report", "--no-train"]):
        with mock.patch.dict(os.environ, SILALIB_RESULTS="/proc/self"):
            assert main(arguments) == 1
        error = capsys.readouterr().err
        assert "cannot write to /proc/self" in error and "Traceback" not in error
        assert "set SILALIB_RESULTS to a folder of yours" in error.splitlines()[-1]
        counts["inputs refused"] += 1


def test_the_records_of_this_project_are_what_was_written():
    sealed = list(ROOT.glob("results/*/runs/*/result.sha256"))
    assert sealed
    for path in sealed:
        result = files.read_sealed(path.with_name("result.json"), "mend it")
        kept = {name for name in result["files"] if path.with_name(name).exists()}
        assert set(result["files"]) - kept <= {"weights.safetensors", "test.npz"}
        for name in kept:
            assert files.sha256(path.with_name(name).read_bytes()) == result["files"][name]
