"""What a GPU needs: graphs that fail, memory that is given back, devices shared out. Last, what only a GPU can show."""

import gc
import os
import re
import subprocess
import sys
import time
import weakref
from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue
from threading import Event
from unittest import mock

import pytest
import torch
from conftest import losses, train
from train_step import PLAIN

from silalib import early_exit, models
from silalib.__main__ import main
from silalib.errors import GraphFailed, NoDevice, ProcessSpoilt, Stopped, UserError
from silalib.files import ROOT, results_folder
from silalib.launch import ensure, processes, torchrun, workers
from silalib.launch.progress import Progress
from silalib.losses import METHODS
from silalib.records import load, state
from silalib.run import Run
from silalib.training import execution, trainer
from silalib.training.execution import GraphedCallable

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# -- captured graphs


def fails(function, inputs):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def test_a_graph_that_cannot_be_captured_ends_the_run_with_its_reason():
    """And not in this process: the generator may be in capture mode for ever."""
    captured = GraphedCallable(lambda x: [2 * x], fails)
    for i in range(execution.EAGER_CALLS):
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

    captured = GraphedCallable(lambda x: [x], invalid)
    expected = torch.OutOfMemoryError if isinstance(first, torch.OutOfMemoryError) else GraphFailed
    with pytest.raises(expected, match=r"CUDA out of memory|a synchronisation"):
        for _ in range(execution.EAGER_CALLS + 1):
            captured(torch.ones(1))


def test_an_allocator_that_refuses_does_not_hide_why_a_graph_failed():
    """As after a failed capture."""
    refuses = RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
    with mock.patch.object(torch.cuda, "empty_cache", side_effect=refuses):
        trainer.give_memory_back()


def test_out_of_memory_in_a_capture_is_told_as_such():
    def full(function, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    captured = GraphedCallable(lambda x: [x], full)
    with pytest.raises(torch.OutOfMemoryError):
        for _ in range(execution.EAGER_CALLS + 1):
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

    captured = GraphedCallable(lambda x: [x], capture)
    try:
        if not enabled:
            gc.disable()
        for _ in range(execution.EAGER_CALLS + 2):
            captured(torch.ones(1))
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert seen == [(False, None)]


def test_no_algorithms_are_searched_for_shapes_that_come_once():
    searched = []
    captured = GraphedCallable(lambda x: [x] if searched.append(torch.backends.cudnn.benchmark) is None else [])
    with execution.no_search(search=True):  # as in training on a GPU
        assert not torch.backends.cudnn.allow_tf32  # float32 is float32
        captured(torch.ones(4))
        captured(torch.ones(3))
        captured(torch.ones(4))
    assert searched == [True, False, True]
    with execution.settings(CPU):
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
def two_runs(tiny, plan, cores):
    cores(1)
    grid = [tiny(seed=seed) for seed in (0, 1)]
    plan(grid)
    return grid


def train_by(function, runs, **job):
    """What became of the runs, trained in this process by another function than `trainer.train`."""
    schedule = workers.Schedule(runs, in_tests(train_by=function, **job), Event(), Progress(dict.fromkeys(runs, 1)))
    workers.in_this_process(schedule)
    return schedule.outcomes


def in_tests(**job):
    return workers.Job(results_folder("quick") / "runs", "cpu", **job)


def first_graph_fails(run, folder, device, *, graphs, **more):
    """At the top of a module, where another process finds it."""
    if graphs and run.seed == 0:
        raise GraphFailed("no CUDA graph (a reason)")
    more["progress"](run=run, text=f"trained by process {os.getpid()}")
    return trainer.train(run, folder, device, graphs=False, **more)


@pytest.mark.slow
def test_after_a_failed_graph_the_run_is_done_again_in_a_fresh_process(two_runs, capsys):
    """The first attempt is made here, where the graph fails; nothing more is trained here."""
    outcomes = train_by(first_graph_fails, two_runs)
    assert [state(run) for run in two_runs] == ["done", "done"] and list(outcomes) == two_runs
    err = capsys.readouterr().err
    assert err.count("no CUDA graph (a reason): done again without, in another process") == 1
    pids = set(re.findall(r"trained by process (\d+)", err))
    assert len(pids) == 1 and pids != {str(os.getpid())}


def test_a_failed_graph_in_a_worker_ends_its_process(two_runs, capsys):
    """Of a pool without processes: what is submitted, and with which settings; then the caller starts another one."""
    submitted = []

    def submit(job, run):
        submitted.append((run.seed, job.graphs))
        future = Future()
        failed = run.seed == 0 and job.graphs
        future.set_result(GraphFailed("no CUDA graph (a reason)") if failed else Stopped("well done"))
        return future

    schedule = workers.Schedule(two_runs, in_tests(), Event(), Progress(dict.fromkeys(two_runs, 1)))
    workers.in_pool(schedule, 1, submit, SimpleQueue(), lambda: None)
    assert submitted == [(0, True)] and schedule.waiting == two_runs
    workers.in_pool(schedule, 1, submit, SimpleQueue(), lambda: None)
    assert submitted[1:] == [(0, False), (1, True)]
    assert {run: str(outcome) for run, outcome in schedule.outcomes.items()} == dict.fromkeys(two_runs, "well done")


@pytest.mark.parametrize("option", [True, False])
def test_no_graphs_is_an_option(option, two_runs):
    asked = []
    with pytest.raises(UserError):
        ensure.train_all(two_runs, "quick", "cpu", 1, graphs=option,
                         train_by=lambda *_, graphs, **__: asked.append(graphs) or {}["no result"])  # fmt: skip
    assert asked == [option] * 2


def test_a_training_is_gone_when_it_has_ended(tiny, tmp_path):
    """With its networks and graphs, and without the collector: the next run may capture at once."""
    train(tiny(), tmp_path / "first")  # in which torch imports more, and keeps frames in cycles
    trainings = lambda: [o for o in gc.get_objects() if type(o) is trainer.Training]
    asked = []

    def stop():
        asked.append(len(trainings()))
        return "now" if len(asked) == 7 else None

    gc.collect()
    gc.disable()
    try:
        train(tiny(noise_images=10, noise_sigmas=1, noise_draws=1, epochs=1), tmp_path / "a", stop=stop)
        assert trainings() == []
        with pytest.raises(Stopped):
            train(tiny(), tmp_path / "b", stop=stop)
        assert trainings() == []
        assert len(asked) == 7 and set(asked) == {1}
    finally:
        gc.enable()


# -- devices


@pytest.fixture
def gpus():
    """gpus(n): meanwhile this machine has n GPUs, or so it seems."""
    return lambda n: mock.patch.multiple(torch.cuda, is_available=lambda: n > 0, device_count=lambda: n)


def test_workers_take_the_gpus_in_turn(gpus):
    own = lambda name, place: str(torchrun.own_gpu(name, place))
    with gpus(3):
        assert [own("auto", place) for place in range(4)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
        assert own("cuda:1", 2) == "cuda:1" and own("cpu", 1) == "cpu"


def test_by_default_each_gpu_has_one_worker(gpus, cores):
    """Of two GPUs; one that is named is one. On a CPU a core each, or all cores as threads of one worker."""
    cores(2)
    share = lambda device, workers=None, runs=9: ensure.share(torch.device(device), workers, runs)
    with gpus(2):
        assert [share(device) for device in ("cuda", "cuda:1")] == [(2, 1), (1, 1)]
        assert share("cuda", 5) == (5, 1) and share("cuda", None, 1) == (1, 1)
    both = processes.cpu_cores()
    of_the_cpu = share("cpu"), share("cpu", 1), share("cpu", 5), share("cpu", None, 1)
    assert of_the_cpu == ((both, 1), (1, both), (5, 1), (1, 1))


def test_a_gpu_that_is_not_there_is_one_line(two_runs, capsys):
    here = torch.cuda.device_count()
    assert main(["train", "tiny", "--device", f"cuda:{here}"]) == 1
    expected = f"silalib: error: device cuda:{here} is not here ({here} GPUs found): use --device cpu or auto\n"
    assert capsys.readouterr().err == expected


def test_a_gpu_that_cannot_be_used_stops_all_with_its_reason(two_runs, capsys):
    error = RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")
    reason = r"cannot be used \(The NVIDIA driver .*11040\)\.\): mend that, or use --device"
    with mock.patch.object(torch, "zeros", side_effect=error), pytest.raises(NoDevice, match=reason):
        trainer.check_usable(CUDA)

    def unusable(*_, **__):
        raise NoDevice("device cuda cannot be used (too old): mend that, or use --device cpu")

    outcomes = train_by(unusable, two_runs)
    assert list(outcomes) == two_runs[:1] and isinstance(outcomes[two_runs[0]], NoDevice)  # the other was not begun
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
def test_every_word_for_a_full_gpu_is_one_line(message, two_runs):
    def full(*_, **__):
        raise RuntimeError(message)

    outcomes = train_by(full, two_runs)
    expected = "out of GPU memory at batch size 32: use fewer --workers or --device cpu"
    assert [str(outcomes[run]) for run in two_runs] == [f"{run}: {expected}" for run in two_runs]
    assert [state(run) for run in two_runs] == ["pending", "pending"]


def gpu_breaks(run, *arguments, **more):
    if run.seed == 0:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    more["progress"](run=run, text=f"trained by process {os.getpid()}")
    return trainer.train(run, *arguments, **more)


def test_after_an_error_of_the_gpu_others_go_on_in_a_fresh_process(two_runs, capsys):
    """Every later call of that process would fail too."""
    outcomes = train_by(gpu_breaks, two_runs)
    assert isinstance(outcomes[two_runs[0]], ProcessSpoilt)
    assert [state(run) for run in two_runs] == ["failed", "done"]
    err = capsys.readouterr().err
    assert "an illegal memory access" in err
    assert re.findall(r"trained by process (\d+)", err) != [str(os.getpid())]


# -- a machine that is there for a while


def test_no_run_is_started_that_cannot_end(tiny, record):
    """A run of this network took so many seconds: ten times as long is not begun in less time."""
    run, origin = record.run, record.result["provenance"]
    took = origin["seconds"] + origin["seconds_final"]
    longer, other = replace(run, epochs=10 * run.epochs), tiny(nets=("mobilenet",), method="ind", epochs=10**6)
    for only_whole, left, begun in ((True, 5 * took, False), (True, 20 * took, True), (False, 5 * took, True)):
        job = in_tests(deadline=time.time() + left, only_whole=only_whole)
        schedule = workers.Schedule([longer, longer, other], job, Event(), Progress({run: 1}))
        assert schedule.next()[0] == longer  # nothing is known yet
        schedule.end(run, "well done")
        assert schedule.next()[0] == (longer if begun else other)
        assert isinstance(schedule.outcomes.get(longer, "begun"), Stopped) != begun


# -- nothing that a training does not need


def test_training_needs_nothing_of_the_report(tmp_path):
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
from silalib.run import Run
run = Run("digits", ("convnet12",), "ind", width=0.0625, epochs=1, train_size=64, batch_size=32, milestones=())
experiments.EXHIBITS = {{"tiny": experiments.Exhibit("Tiny", lambda profile="quick", seeds=None: [run], None)}}
from silalib.__main__ import main
sys.exit(main(["status", "tiny"]) or main(["train", "tiny"]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "SILALIB_RESULTS": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stderr


# -- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = 20
NETWORKS = {net: dict(nets=(net,) * 2, width=0.125) for net in models.MODELS if not net.startswith("msdnet")}
NETWORKS |= {"msdnet_anytime": dict(nets=("msdnet_anytime",), width=0.25, blocks=2)}


def steps(run, speed, device, count=STEPS, nudge=0.0):
    """Training NLL of every head at each of the first steps, (count, C), and the training itself.

    nudge: relative size of random changes to the initial weights.
    """
    gpus = [0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), execution.settings(device):
        training = trainer.Training(run, device, speed)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in [p for net in training.nets.values() for p in net.parameters()] if nudge else ():
                p.mul_(1 + nudge * torch.randn(p.shape, generator=g))
        return losses(training, count), training


def slow_learner(tiny, **changes):
    """A rate that keeps rounding errors from growing."""
    return tiny(**dict(train_size=128, epochs=5, lr=0.005, warmup=0.0) | changes)


CASES = [(net, "sila") for net in NETWORKS] + [("resnet18", method) for method in METHODS if method != "sila"]


@needs_gpu
@pytest.mark.parametrize("net", ["vgg13", "vgg19"])
def test_masks_of_dropout_are_equal_in_graph_and_eager(net, tiny):
    """Each dropout is given ones, so that what it gives is its mask."""
    run = slow_learner(tiny, method="ind", nets=(net,), width=0.125)
    masks = {}
    for graphs in (False, True):
        with execution.settings(CUDA):
            training = trainer.Training(run, CUDA, execution.fast(CUDA, bf16=False, graphs=graphs))
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
            losses(training, STEPS)
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
        record = train(run, tmp_path / str(i), "cuda")
        origin = record.result["provenance"]
        assert (origin["kind"], origin["graphs"]) == ("cuda", True) and origin["cuda"] and origin["cudnn"]
        used.append(torch.cuda.memory_allocated())
    assert used[2] <= used[0] + 2**20


@needs_gpu
def test_a_resumed_run_on_a_gpu_ends_close_to_an_uninterrupted_one(tiny, tmp_path):
    run = slow_learner(tiny, nets=("resnet18",) * 2, width=0.125)
    whole = train(run, tmp_path / "whole", "cuda")
    asked = iter(range(10**6))
    with pytest.raises(Stopped):
        train(run, tmp_path / "parts", "cuda", stop=lambda: "now" if next(asked) == 8 else None)
    record = train(run, tmp_path / "parts", "cuda")
    for head, other in zip(record.heads, whole.heads):
        assert head["train_nll"] == pytest.approx(other["train_nll"], rel=0.1)


@needs_gpu
def test_a_capture_that_fails_leaves_a_run_that_is_done_again(tmp_path):
    """In a process of its own, since it may never capture again: a host synchronisation in the step."""
    program = """
import torch
from silalib import experiments, losses
from silalib.run import Run
real = losses.METHODS["ind"]
def waits(logits, target, **more):
    if torch.cuda.is_current_stream_capturing():
        target.sum().item()
    return real(logits, target, **more)
losses.METHODS["ind"] = waits
run = Run("digits", ("vgg13",), "ind", width=0.125, epochs=4, train_size=64, batch_size=32, milestones=())
experiments.EXHIBITS = {"tiny": experiments.Exhibit("Tiny", lambda profile="quick", seeds=None: [run], None)}
from silalib.__main__ import main
import sys
if __name__ == "__main__":
    sys.exit(main(["train", "tiny", "--device", "cuda"]))
"""
    script = tmp_path / "fails.py"
    script.write_text(program)
    environment = {**os.environ, "SILALIB_RESULTS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "done again without, in another process" in done.stderr
    (path,) = tmp_path.glob("quick/runs/*/result.json")
    assert '"graphs": false' in path.read_text()


@needs_gpu
def test_a_full_gpu_is_one_line(plan, capsys):
    run = Run("digits", ("vgg19",) * 2, "sila", width=1.0, epochs=1, train_size=1024, batch_size=1024, milestones=())
    plan([run])
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
    assert list(ensure.ensure(grid, device="cuda", workers=2)) == grid
    assert all(load(run).result["provenance"]["kind"] == "cuda" for run in grid)


@needs_gpu
@pytest.mark.parametrize("net, method", CASES)
def test_a_graph_follows_the_eager_steps(net, method, tiny):
    """With kernels that add in one order alone: the same to the last digits, dropout included."""
    fixed = dict(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    run = slow_learner(tiny, method=method, augment="crop+flip", **NETWORKS[net])
    for bf16 in (False, True):
        with mock.patch.object(execution, "no_search", lambda search=False: torch.backends.cudnn.flags(**fixed)):
            eager, _ = steps(run, execution.fast(CUDA, bf16, graphs=False), CUDA)
            graph, training = steps(run, execution.fast(CUDA, bf16), CUDA)
        assert training.captured_update.replay is not None
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-7)


def follows(own, reference, nudged):
    """Whether NLLs differ from the reference, up to every step, by no more than 20 times what a change of the initial
    weights in the sixth digit does: these networks spread rounding errors, some a thousand times in a few steps."""
    apart = lambda values: ((values - reference).abs() / reference).amax(1)
    return bool((apart(own) < 20 * apart(nudged).cummax(0).values + 1e-6).all())


def test_what_follows_and_what_does_not(tiny):
    """On a CPU: float32 in another layout follows; bfloat16, TF32's kind of error, does not."""
    run = slow_learner(tiny, method="sila", **NETWORKS["vgg13"])
    plain, nudged = (steps(run, PLAIN, CPU, 4, n)[0] for n in (0.0, 1e-6))
    fast, rounded = (steps(run, execution.Speed(bf16=bf16), CPU, 4)[0] for bf16 in (False, True))
    assert follows(fast, plain, nudged) and not follows(rounded, plain, nudged)


@needs_gpu
@pytest.mark.parametrize("net, method", CASES)
def test_float32_on_a_gpu_follows_the_cpu(net, method, tiny):
    """TF32 off. Dropout draws other masks there, so it is left out."""
    run = slow_learner(tiny, method=method, **NETWORKS[net])
    with mock.patch.object(torch.nn.Dropout, "forward", lambda self, x: x):
        cpu, nudged = (steps(run, PLAIN, CPU, 6, n)[0] for n in (0.0, 1e-6))
        gpu, _ = steps(run, execution.fast(CUDA, bf16=False, graphs=False), CUDA, 6)
    assert follows(gpu, cpu, nudged)
