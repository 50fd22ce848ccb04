"""What a GPU needs: graphs that fail, memory that is given back, devices shared out. Last, what only a GPU can show."""

import gc
import subprocess
import sys
import weakref
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from silalib import early_exit, experiments, launch, models, runs, speed, trainer
from silalib.__main__ import main
from silalib.augment import epoch_plan
from silalib.errors import GraphFailed, NoDevice
from silalib.losses import METHODS
from silalib.paths import ROOT
from silalib.runs import Run, load, state
from silalib.speed import PLAIN, Captured

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# -- captured graphs


def fails(function, inputs):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def test_a_graph_that_cannot_be_captured_ends_the_run_with_its_reason():
    """And not in this process: the generator may be in capture mode for ever."""
    captured = Captured(lambda x: [2 * x], fails)
    for i in range(speed.EAGER_CALLS):
        assert captured(torch.tensor([float(i)]))[0].item() == 2 * i
    with pytest.raises(GraphFailed, match=r"no CUDA graph \(operation not permitted when stream is capturing\)$"):
        captured(torch.ones(1))
    assert gc.isenabled()


@pytest.mark.parametrize("first", [RuntimeError("a synchronisation"), torch.OutOfMemoryError("CUDA out of memory")])
def test_the_reason_is_what_made_the_capture_invalid(first):
    """PyTorch ends an invalid capture with an error of its own, which hides the first."""

    def invalid(function, inputs):
        try:
            raise first
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    captured = Captured(lambda x: [x], invalid)
    expected = torch.OutOfMemoryError if isinstance(first, torch.OutOfMemoryError) else GraphFailed
    with pytest.raises(expected, match=r"CUDA out of memory|a synchronisation"):
        for _ in range(speed.EAGER_CALLS + 1):
            captured(torch.ones(1))


def test_an_allocator_that_refuses_does_not_hide_why_a_graph_failed(monkeypatch):
    """As after a failed capture."""

    def refuses():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "empty_cache", refuses)
    trainer.give_memory_back()


def test_out_of_memory_in_a_capture_is_told_as_such():
    def full(function, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    captured = Captured(lambda x: [x], full)
    with pytest.raises(torch.OutOfMemoryError):
        for _ in range(speed.EAGER_CALLS + 1):
            captured(torch.ones(1))


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_during_a_capture(enabled):
    """What lies in a cycle is collected before, and the collector is afterwards as it was."""

    class Graph:
        pass

    graph = Graph()
    graph.itself, seen = graph, []
    gone = weakref.ref(graph)
    del graph

    def capture(function, inputs):
        seen.append((gc.isenabled(), gone()))
        return lambda: None, [inputs[0]]

    captured = Captured(lambda x: [x], capture)
    try:
        if not enabled:
            gc.disable()
        for _ in range(speed.EAGER_CALLS + 2):
            captured(torch.ones(1))
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert seen == [(False, None)]


def test_no_algorithms_are_searched_for_shapes_that_come_once():
    searched = []
    captured = Captured(lambda x: [x] if searched.append(torch.backends.cudnn.benchmark) is None else [])
    with speed.settings(CUDA):
        assert not torch.backends.cudnn.allow_tf32  # float32 is float32
        captured(torch.ones(4))
        captured(torch.ones(3))
        captured(torch.ones(4))
    assert searched == [True, False, True]
    with speed.settings(CPU):
        assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("net", models.MODELS)
def test_costs_are_those_of_a_network_without_weights(net):
    """A GPU would search algorithms for one image."""
    stem = models.STEMS.get(net, ("cifar",))[-1]
    image = (3, 64, 64) if stem == "imagenet" else (3, 32, 32)
    make = lambda: models.MODELS[net](10, 3, 0.125, stem)
    with torch.device("meta"):
        light = make()
    for budgeted in (False, True):
        assert early_exit.exit_costs(light, image, budgeted) == early_exit.exit_costs(make(), image, budgeted)


@pytest.fixture
def two_runs(tiny, monkeypatch):
    grid = [tiny(seed=seed) for seed in (0, 1)]
    exhibit = experiments.Exhibit("Tiny", lambda profile="quick", seeds=None: grid, None)
    monkeypatch.setattr(experiments, "EXHIBITS", {"tiny": exhibit})
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: {0}, raising=False)
    return grid


def test_after_a_failed_graph_the_run_is_done_again_in_a_fresh_process(two_runs, monkeypatch, capsys):
    """The first attempt is made here, where the graph fails; nothing more is trained here."""
    asked = []

    def no_graph(run, *arguments, graphs, **more):
        asked.append((run, graphs))
        raise GraphFailed("no CUDA graph (a reason)")

    monkeypatch.setattr(trainer, "train", no_graph)
    assert main(["train", "tiny", "--workers", "1"]) == 0
    assert asked == [(two_runs[0], True)]
    assert [state(run) for run in two_runs] == ["done", "done"]
    err = capsys.readouterr().err
    assert err.count("no CUDA graph (a reason): done again without, in another process") == 1


def test_a_failed_graph_in_a_worker_ends_its_process(two_runs, monkeypatch, capsys):
    """The pool of processes, without processes: what is submitted to which, and with which settings."""
    submitted = []

    class Pool:
        def __init__(self, workers, context, initializer, initargs):
            submitted.append([])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, job, run):
            submitted[-1].append((run.seed, job.graphs))
            future = Future()
            failed = run.seed == 0 and job.graphs
            future.set_result(GraphFailed("no CUDA graph (a reason)") if failed else "well done")
            return future

    monkeypatch.setattr(launch, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(launch, "drain", lambda *_: None)
    progress = launch.Progress({run: 1 for run in two_runs})
    job = launch.Job(None, "cpu", 1, None, False, False)
    outcomes = launch.in_workers([*two_runs, two_runs[1]], job, 1, launch.threading.Event(), progress)
    assert submitted == [[(0, True)], [(0, False), (1, True), (1, True)]]
    assert outcomes == dict.fromkeys(two_runs, "well done")


def test_no_graphs_is_an_option(two_runs, monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "in_this_process", lambda here, job, *_: asked.append(job.graphs) or {})
    for option in ([], ["--no-graphs"]):
        main(["train", "tiny", "--workers", "1", *option])
    assert asked == [True, False]


def test_a_training_is_gone_when_it_has_ended(tiny, tmp_path, monkeypatch):
    """With its networks and graphs, and without the collector: the next run may capture at once."""
    trainer.train(tiny(), tmp_path / "first", "cpu")  # in which torch imports more, and keeps frames in cycles
    alive = []
    make = trainer.Training.__init__
    monkeypatch.setattr(
        trainer.Training, "__init__", lambda self, *args: (alive.append(weakref.ref(self)), make(self, *args))[1]
    )
    gc.collect()
    gc.disable()
    try:
        trainer.train(tiny(noise_images=10, noise_sigmas=1, noise_draws=1), tmp_path / "a", "cpu")
        with pytest.raises(trainer.Stopped):
            trainer.train(tiny(), tmp_path / "b", "cpu", stop=lambda: "now")
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


# -- devices


def test_workers_take_the_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [launch.own_gpu("auto", place) for place in range(4)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert launch.own_gpu("cuda:1", 2) == "cuda:1" and launch.own_gpu("cpu", 1) == "cpu"


def test_by_default_each_gpu_has_one_worker(two_runs, monkeypatch):
    """Two GPUs, one core; a GPU that is named is one."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch, "in_workers", lambda here, job, workers, *_: asked.append(workers) or {})
    monkeypatch.setattr(launch, "in_this_process", lambda here, job, workers, *_: asked.append(workers) or {})
    for device in ("auto", "cuda", "cuda:1"):
        main(["train", "tiny", "--device", device])
    assert asked == [2, 2, 1]


def test_a_gpu_that_is_not_there_is_one_line(two_runs, capsys):
    here = torch.cuda.device_count()
    assert main(["train", "tiny", "--device", f"cuda:{here}"]) == 1
    expected = f"silalib: error: device cuda:{here} is not here ({here} GPUs found): use --device cpu or auto\n"
    assert capsys.readouterr().err == expected


def test_a_gpu_that_cannot_be_used_stops_all_with_its_reason(two_runs, monkeypatch, capsys):
    def zeros(*_, device):
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(trainer, "pick_device", lambda name: CPU)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.torch, "zeros", zeros)
        with pytest.raises(
            NoDevice, match=r"cannot be used \(The NVIDIA driver .*11040\)\.\): mend that, or use --device"
        ):
            trainer.check_usable(CUDA)

    def unusable(device):
        raise NoDevice("device cuda cannot be used (too old): mend that, or use --device cpu")

    monkeypatch.setattr(trainer, "check_usable", unusable)
    assert main(["train", "tiny", "--workers", "1"]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("silalib: error: 1 of 2 runs failed, the first: device cuda cannot be used")
    assert "Traceback" not in err
    assert [state(run) for run in two_runs] == ["pending", "pending"]


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors",
        "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "FIND was unable to find an engine to execute this computation",
    ],
)
def test_every_word_for_a_full_gpu_is_one_line(message, two_runs, monkeypatch, capsys):
    def full(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(trainer, "train", full)
    assert main(["train", "tiny", "--workers", "1"]) == 1
    assert "out of GPU memory at batch size 32: use fewer --workers or --device cpu" in capsys.readouterr().err
    assert [state(run) for run in two_runs] == ["pending", "pending"]


def test_after_an_error_of_the_gpu_others_go_on_in_a_fresh_process(two_runs, monkeypatch, capsys):
    """Every later call of that process would fail too."""

    def broken(run, *_, **__):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(trainer, "train", broken)
    assert main(["train", "tiny", "--workers", "1"]) == 1
    assert [state(run) for run in two_runs] == ["failed", "done"]
    assert "an illegal memory access" in capsys.readouterr().err


# -- a machine that is there for a while


def test_no_run_is_started_that_cannot_end(tiny, record, results):
    """A run of this network took so many seconds: ten times as long is not begun in less time."""
    run, origin = record.run, record.result["provenance"]
    took = origin["seconds"] + origin["seconds_final"]
    longer = replace(run, epochs=10 * run.epochs)
    for only_whole, left, expected in ((True, 5 * took, True), (True, 20 * took, False), (False, 5 * took, False)):
        job = launch.Job(results, "cpu", 1, launch.time.time() + left, only_whole, False)
        pace = launch.Pace(job)
        assert not pace.too_long(longer)  # nothing is known yet
        pace.learn(run)
        assert pace.too_long(longer) == expected
    other = tiny(nets=("mobilenet",), method="ind", epochs=10**6)
    assert not pace.too_long(other)


def test_what_is_left_out_for_want_of_time_is_left(two_runs, monkeypatch, capsys):
    monkeypatch.setattr(launch.Pace, "too_long", lambda self, run: run.seed == 0)
    assert main(["train", "tiny", "--workers", "1", "--budget", "60s", "--only-whole"]) == 75
    assert "stopped with 1 of 2 runs left" in capsys.readouterr().err
    assert [state(run) for run in two_runs] == ["pending", "done"]


# -- nothing that a training does not need


@pytest.mark.parametrize("command", [["train", "tiny"], ["status", "tiny"], ["bench", "--help"]])
def test_training_needs_nothing_of_the_report(command, tmp_path):
    """A GPU box may have torch alone: papermill and all that renders pages are not imported."""
    unwanted = ("papermill", "nbconvert", "ipykernel", "ipywidgets", "latex2mathml", "jinja2", "seaborn")
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {unwanted!r}:
            raise ImportError(name + " is not wanted here")
sys.meta_path.insert(0, Refuse())
from silalib import experiments
from silalib.runs import Run
run = Run("digits", ("convnet12",), "ind", width=0.0625, epochs=1, train_size=64, batch_size=32, milestones=())
experiments.EXHIBITS = {{"tiny": experiments.Exhibit("Tiny", lambda profile="quick", seeds=None: [run], None)}}
from silalib.__main__ import main
try:
    code = main({command!r})
except SystemExit as end:
    code = end.code
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                          env={**launch.os.environ, "SILALIB_RESULTS": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stderr


# -- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = 20
NETWORKS = {net: dict(nets=(net,) * 2, width=0.125) for net in models.MODELS if not net.startswith("msdnet")}
NETWORKS |= {"msdnet_anytime": dict(nets=("msdnet_anytime",), width=0.25, blocks=2)}


def steps(run, settings, folder, device, count=STEPS, nudge=0.0):
    """Training NLL of every head at each of the first steps, (count, C), and the training itself.

    nudge: relative size of random changes to the initial weights.
    """
    gpus = [0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), speed.settings(device), speed.own_stream(device):
        training = trainer.Training(run, folder, device, lambda: None, lambda **message: None, None, speed=settings)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in [p for net in training.nets.values() for p in net.parameters()] if nudge else ():
                p.mul_(1 + nudge * torch.randn(p.shape, generator=g))
        rows = []
        for step in range(count):
            epoch, i = divmod(step, training.steps_per_epoch)
            plan = epoch_plan(run, epoch, len(training.target), device)
            training.one_step(*(part[i * run.batch_size : (i + 1) * run.batch_size] for part in plan))
            training.step += 1
            rows.append(training.sums[:, 0].clone())
            training.sums.zero_()
        return torch.stack(rows).cpu(), training


def slow_learner(tiny, **changes):
    """A rate that keeps rounding errors from growing."""
    return tiny(**dict(train_size=128, epochs=5, lr=0.005, warmup=0.0) | changes)


CASES = [(net, "sila") for net in NETWORKS] + [("resnet18", method) for method in METHODS if method != "sila"]


@needs_gpu
@pytest.mark.parametrize("net", ["vgg13", "vgg19"])
def test_masks_of_dropout_are_equal_in_graph_and_eager(net, tiny, tmp_path):
    """Each dropout is given ones, so that what it gives is its mask."""
    run = slow_learner(tiny, method="ind", nets=(net,), width=0.125)
    masks = {}
    for graphs in (False, True):
        settings = replace(speed.fast(CUDA), half=False, graphs=graphs)
        with speed.settings(CUDA), speed.own_stream(CUDA):
            arguments = run, tmp_path / str(graphs), CUDA, lambda: None, lambda **message: None, None
            training = trainer.Training(*arguments, speed=settings)
            drop = next(m for m in training.nets[0].modules() if isinstance(m, torch.nn.Dropout))
            drop.register_forward_pre_hook(lambda module, inputs: (torch.ones_like(inputs[0]),))
            kept = []

            def note(module, inputs, output, kept=kept):
                if not kept:
                    kept.append(torch.zeros(STEPS, *output.shape, dtype=torch.bool, device=CUDA))
                    kept.append(torch.zeros((), dtype=torch.long, device=CUDA))
                kept[0].index_copy_(0, kept[1][None], (output != 0)[None])
                kept[1].add_(1)

            drop.register_forward_hook(note)
            for step in range(STEPS):
                epoch, i = divmod(step, training.steps_per_epoch)
                plan = epoch_plan(run, epoch, len(training.target), CUDA)
                training.one_step(*(part[i * run.batch_size : (i + 1) * run.batch_size] for part in plan))
                training.step += 1
            masks[graphs] = kept[0].cpu()
    assert 0.3 < masks[False].float().mean() < 0.7
    assert not torch.equal(masks[False][0], masks[False][1])
    assert torch.equal(masks[True], masks[False])


@needs_gpu
@pytest.mark.parametrize("net, changes", [("resnet18", {}), ("vgg13", {}), ("mobilenet", {"augment": "autoaugment"})])
def test_runs_one_after_the_other_in_one_process(net, changes, tiny, tmp_path):
    """Each captures its graphs after those of the one before are gone; memory comes back."""
    used = []
    for i in range(3):
        run = tiny(nets=(net,) * 2, width=0.125, epochs=6, noise_images=20, noise_sigmas=2, noise_draws=2, **changes)
        record = trainer.train(run, tmp_path / str(i), "cuda")
        origin = record.result["provenance"]
        assert (origin["kind"], origin["graphs"]) == ("cuda", True) and origin["cuda"] and origin["cudnn"]
        used.append(torch.cuda.memory_allocated())
    assert used[2] <= used[0] + 2**20


@needs_gpu
def test_a_resumed_run_on_a_gpu_ends_close_to_an_uninterrupted_one(tiny, tmp_path):
    run = slow_learner(tiny, nets=("resnet18",) * 2, width=0.125)
    whole = trainer.train(run, tmp_path / "whole", "cuda")
    asked = iter(range(10**6))
    with pytest.raises(trainer.Stopped):
        trainer.train(run, tmp_path / "parts", "cuda", stop=lambda: "now" if next(asked) == 8 else None)
    record = trainer.train(run, tmp_path / "parts", "cuda")
    for head, other in zip(record.heads, whole.heads):
        assert head["train_nll"] == pytest.approx(other["train_nll"], rel=0.1)


@needs_gpu
def test_a_capture_that_fails_leaves_a_run_that_is_done_again(tmp_path):
    """In a process of its own, since it may never capture again: a host synchronisation in the step."""
    program = """
import torch
from silalib import experiments, losses, trainer
from silalib.runs import Run
real = losses.METHODS["ind"]
def waits(logits, target, **more):
    if torch.cuda.is_current_stream_capturing():
        target.sum().item()
    return real(logits, target, **more)
losses.METHODS["ind"] = trainer.METHODS["ind"] = waits
run = Run("digits", ("vgg13",), "ind", width=0.125, epochs=4, train_size=64, batch_size=32, milestones=())
experiments.EXHIBITS = {"tiny": experiments.Exhibit("Tiny", lambda profile="quick", seeds=None: [run], None)}
from silalib.__main__ import main
import sys
if __name__ == "__main__":
    sys.exit(main(["train", "tiny", "--device", "cuda"]))
"""
    script = tmp_path / "fails.py"
    script.write_text(program)
    environment = {**launch.os.environ, "SILALIB_RESULTS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "done again without, in another process" in done.stderr
    (path,) = tmp_path.glob("quick/runs/*/result.json")
    assert '"graphs": false' in path.read_text()


@needs_gpu
def test_a_full_gpu_is_one_line(tmp_path, monkeypatch, capsys):
    run = Run("digits", ("vgg19",) * 2, "sila", width=1.0, epochs=1, train_size=1024, batch_size=1024, milestones=())
    exhibit = experiments.Exhibit("Tiny", lambda profile="quick", seeds=None: [run], None)
    monkeypatch.setattr(experiments, "EXHIBITS", {"tiny": exhibit})
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        assert main(["train", "tiny", "--device", "cuda", "--workers", "1"]) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    err = capsys.readouterr().err
    assert "out of GPU memory at batch size 1024" in err and "Traceback" not in err


@needs_gpu
def test_several_workers_share_a_gpu(tiny, results):
    grid = [tiny(seed=seed, nets=("resnet18",) * 2, width=0.125) for seed in range(4)]
    assert list(runs.ensure(grid, device="cuda", workers=2)) == grid
    assert all(load(run).result["provenance"]["kind"] == "cuda" for run in grid)


@needs_gpu
@pytest.mark.parametrize("net, method", CASES)
def test_a_graph_follows_the_eager_steps(net, method, tiny, tmp_path, monkeypatch):
    """With kernels that add in one order alone: the same to the last digits, dropout included."""
    fixed = dict(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    monkeypatch.setattr(speed, "settings", lambda device: torch.backends.cudnn.flags(**fixed))
    run = slow_learner(tiny, method=method, augment="crop+flip", **NETWORKS[net])
    for half in (False, True):
        settings = replace(speed.fast(CUDA), half=half)
        eager, _ = steps(run, replace(settings, graphs=False), tmp_path / f"eager{half}", CUDA)
        graph, training = steps(run, settings, tmp_path / f"graph{half}", CUDA)
        assert training.captured_update.replay is not None
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-7)


def follows(own, reference, nudged):
    """Whether NLLs differ from the reference, up to every step, by no more than 20 times what a change of the initial
    weights in the sixth digit does: these networks spread rounding errors, some a thousand times in a few steps."""
    apart = lambda values: ((values - reference).abs() / reference).amax(1)
    return bool((apart(own) < 20 * apart(nudged).cummax(0).values + 1e-6).all())


def test_what_follows_and_what_does_not(tiny, tmp_path):
    """On a CPU: float32 in another layout follows; bfloat16, TF32's kind of error, does not."""
    run = slow_learner(tiny, method="sila", **NETWORKS["vgg13"])
    plain, nudged = (steps(run, PLAIN, tmp_path / str(n), CPU, 4, n)[0] for n in (0.0, 1e-6))
    fast, rounded = (steps(run, speed.Speed(half=half), tmp_path / f"h{half}", CPU, 4)[0] for half in (False, True))
    assert follows(fast, plain, nudged) and not follows(rounded, plain, nudged)


@needs_gpu
@pytest.mark.parametrize("net, method", CASES)
def test_float32_on_a_gpu_follows_the_cpu(net, method, tiny, tmp_path, monkeypatch):
    """TF32 off. Dropout draws other masks there, so it is left out."""
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
    run = slow_learner(tiny, method=method, **NETWORKS[net])
    cpu, nudged = (steps(run, PLAIN, tmp_path / str(n), CPU, 6, n)[0] for n in (0.0, 1e-6))
    gpu, _ = steps(run, replace(speed.fast(CUDA), half=False, graphs=False), tmp_path / "gpu", CUDA, 6)
    assert follows(gpu, cpu, nudged)
