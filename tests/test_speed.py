"""The fast settings give what the plain ones give; a captured function is replayed on what it is called with."""

import gc
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from silalib import bench, speed, trainer
from silalib.__main__ import main
from silalib.augment import epoch_plan
from silalib.experiments import EXHIBITS, cifar_run
from silalib.speed import PLAIN, Captured, Speed

CPU = torch.device("cpu")
STEPS = 20


def losses(run, settings, folder, device=CPU):
    """Training NLL of every head at each of the first 20 steps, (20, C), and the training itself."""
    with torch.random.fork_rng(), speed.own_stream(device):
        training = trainer.Training(run, folder, device, lambda: None, lambda **message: None, None, speed=settings)
        rows = []
        for step in range(STEPS):
            epoch, i = divmod(step, training.steps_per_epoch)
            plan = epoch_plan(run, epoch, len(training.target), device)
            training.one_step(*(part[i * run.batch_size : (i + 1) * run.batch_size] for part in plan))
            training.step += 1
            rows.append(training.sums[:, 0].clone())
            training.sums.zero_()
        return torch.stack(rows).cpu(), training


NETWORKS = {
    "resnet18": dict(nets=("resnet18",) * 2, width=0.25),
    "vgg13": dict(nets=("vgg13",), width=0.25, method="zero-peer"),
    "mobilenet": dict(nets=("mobilenet",), width=0.25, method="ind"),
    "wrn16_10": dict(nets=("wrn16_10",), width=0.0625, method="ind"),
    "exits": dict(nets=("msdnet_anytime",), width=0.25, blocks=2),
}


@pytest.mark.parametrize("case", [*NETWORKS, pytest.param("densenet121", marks=pytest.mark.slow)])
def test_fast_settings_follow_the_plain_path_for_20_steps(case, tiny, tmp_path):
    """Float32 differs by the order of sums alone, which dropout and pooling spread: 1 percent of the NLL at most, 0.1
    on average. bfloat16 has 8 bits: 10 percent at most, 3 on average. A small rate keeps the trajectory from chaos."""
    network = NETWORKS.get(case) or dict(nets=(case,), width=0.25, method="ind")
    run = tiny(train_size=128, epochs=5, lr=0.01, warmup=0.0, **network)
    plain, _ = losses(run, PLAIN, tmp_path / "plain")
    assert plain[-4:].mean() < plain[:4].mean()  # it has learned something in between
    for half, largest, average in ((False, 0.01, 1e-3), (True, 0.1, 0.03)):
        fast, _ = losses(run, Speed(half=half), tmp_path / str(half))
        error = (fast - plain).abs() / plain
        assert error.max() < largest
        assert error.mean() < average


def test_one_thread_gives_the_threads_back():
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), speed.one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
def test_fast_settings_end_as_accurate_as_the_plain_ones(tmp_path):
    """On digits, as Table 1's quick trains: the means of three pairs differ by less than twice the spread of a run."""
    top1 = {"fast": [], "plain": []}
    for seed in range(3):
        run = cifar_run("quick", ("resnet18", "resnet18"), method="sila", seed=seed)
        for name, settings in (("fast", Speed()), ("plain", PLAIN)):
            with torch.random.fork_rng():
                args = (run, tmp_path / f"{name}{seed}", CPU, lambda: None, lambda **message: None, None)
                record = trainer.Training(*args, speed=settings).finish()
            top1[name] += [head["top1"] for head in record.heads]
    fast, plain = (np.array(top1[name]) for name in top1)
    assert min(*fast, *plain) > 80
    assert abs(fast.mean() - plain.mean()) < 2 * np.sqrt((fast.var(ddof=1) + plain.var(ddof=1)) / 2)


def recorded(function, inputs):
    """What `cuda_graph` does, without a GPU: the outputs stay in place, and replay() writes to them."""
    outputs = function(*inputs)

    def replay():
        for own, new in zip(outputs, function(*inputs)):
            own.copy_(new)

    return replay, outputs


def test_a_captured_function_gives_what_the_function_gives():
    scale, eager = torch.ones(()), []

    def function(x, y):
        eager.append(len(x))
        return [x * y * scale, x + y]

    captured = Captured(function, recorded)
    kept = []
    for i in range(8):
        scale.fill_(i)  # as the learning rate changes: in its place
        x, y = torch.randn(4), torch.randn(4)
        kept.append((captured(x, y), [x * y * i, x + y]))
    for given, expected in kept:  # earlier results are not overwritten by later calls
        assert all(torch.equal(a, b) for a, b in zip(given, expected))
    eager.clear()
    assert torch.equal(captured(torch.ones(3), torch.ones(3))[1], torch.full((3,), 2.0))
    assert eager == [3]  # another shape runs the function itself


def test_a_training_step_can_be_captured(tiny, tmp_path):
    """Nothing but the tensors given, and tensors that keep their place, changes between two steps: replaying the update
    on static inputs gives the weights of eager steps, to the last bit."""
    run = tiny(nets=("resnet18",) * 2, width=0.0625, train_size=128, epochs=5, augment="autoaugment")
    _, eager = losses(run, Speed(), tmp_path / "eager")
    with torch.random.fork_rng():
        training = trainer.Training(run, tmp_path / "captured", CPU, lambda: None, lambda **message: None, None)
        training.captured_update = Captured(training.update, lambda function, inputs: (lambda: function(*inputs), None))
        addresses = None
        for step in range(STEPS):
            epoch, i = divmod(step, training.steps_per_epoch)
            plan = epoch_plan(run, epoch, len(training.target), CPU)
            training.one_step(*(part[i * run.batch_size : (i + 1) * run.batch_size] for part in plan))
            training.step += 1
            here = [
                t.data_ptr() for t in (training.sums, *(p for net in training.nets.values() for p in net.parameters()))
            ]
            assert addresses in (None, here)
            addresses = here
    for own, other in zip(training.nets.values(), eager.nets.values()):
        for name, value in own.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_a_learning_rate_in_a_tensor_is_the_same(tiny, tmp_path):
    """As on a GPU, where the captured step reads it; float32 holds 0.1 to seven digits."""
    run = tiny(nets=("resnet18",), method="ind", width=0.0625, train_size=128, epochs=5, lr=0.01)
    number, _ = losses(run, Speed(fused=False), tmp_path / "number")
    real = torch.optim.SGD
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "SGD", lambda p, lr, **more: real(p, lr=torch.tensor(lr), **more))
        tensor, training = losses(run, Speed(fused=False), tmp_path / "tensor")
    assert torch.is_tensor(training.optimizer.param_groups[0]["lr"])
    last = trainer.learning_rate(run, STEPS - 1, training.steps_per_epoch)
    assert training.optimizer.param_groups[0]["lr"].item() == pytest.approx(last, rel=1e-6)
    assert torch.allclose(tensor, number, rtol=1e-4)


def test_memory_does_not_grow_over_50_epochs(tiny, tmp_path, monkeypatch):
    """Counted where it is held: tensors alive, and their bytes, at the end of the second epoch and of the last."""
    alive = []

    def count(**message):
        if "top1" in message and message["step"] in (4, 100):
            gc.collect()
            tensors = {t.untyped_storage().data_ptr(): t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}
            alive.append((len(tensors), sum(t.untyped_storage().nbytes() for t in tensors.values())))

    monkeypatch.setattr(trainer.Training, "save", lambda self: None)  # the disk is not what is counted
    run = tiny(epochs=50)
    trainer.train(run, tmp_path / "run", "cpu", progress=count)
    second, last = alive
    assert last == second


def test_the_memory_of_a_loop_is_its_own(monkeypatch):
    """Three loops hold 100 bytes each and take up 10, 20 and 30 more in an epoch; all are in memory at once."""
    run = bench.configuration("mobilenet", "ind")
    held, most, tested = [0], [0], []

    class Loop:
        training = SimpleNamespace(nets={}, dtypes=[torch.float32])

        def __init__(self, extra, name):
            self.extra, self.name, self.tests = extra, name, 0
            held[0] += 100

        def epoch(self):
            most[0] = max(most[0], held[0] + self.extra)

        def test(self):
            tested.append(self.name)

        def worker_seconds(self):
            return 0

    def memory(device, reset=False):
        if reset:
            most[0] = held[0]
        return held[0], most[0]

    reference = SimpleNamespace(Reference=lambda *_: Loop(10, "reference"))
    extra = {"fast": 20, "plain": 30}
    monkeypatch.setattr(bench, "Ours", lambda run, device, settings: Loop(20 if settings != PLAIN else 30, "ours"))
    monkeypatch.setattr(bench, "memory", memory)
    monkeypatch.setattr(bench, "peak", lambda *_: 1.0)
    rows = bench.measure(run, CPU, list(extra), 2, 1, reference)
    assert {row["speed"]: row["peak_memory_bytes"] for row in rows} == {"fast": 120, "plain": 130}
    assert len(tested) == 2 * (4 + 2)  # the test pass is warmed up, and captured, before it is timed


def test_bench_refuses_unknown_settings(capsys):
    assert main(["bench", "--nets", "msdnet_anytime", "--methods", "ind", "--speeds", "quick"]) == 1
    assert "unknown speed 'quick': choose from fast" in capsys.readouterr().err


def test_projected_time_is_cost_times_measured_speed():
    """Two rows: ResNet18 alone takes 2 s an epoch; its pair with SiLa 4 s, so 1040 s for 260 epochs.

    Figure 3 has IND's pair too, which was not measured and is taken at the mean speed of both: 1040 s."""
    row = lambda method, s: {"nets": "resnet18" if method == "ind" else "resnet18+resnet18", "speed": "fast",
                             "method": method, "seconds_per_epoch": s}  # fmt: skip
    assert bench.projected([row("ind", 2), row("sila", 4)], "fast")["fig3"] == pytest.approx(2080)


@pytest.mark.slow
def test_bench_prints_a_table_and_writes_what_it_rests_on(results, tmp_path, capsys):
    """One step each, so the values mean little; how they hang together is arithmetic."""
    output = tmp_path / "deep" / "bench.json"
    arguments = ["--nets", "mobilenet", "--methods", "ind", "--rounds", "1", "--steps", "1", "--device", "cpu"]
    assert main(["bench", *arguments, "--speeds", "fast", "plain", "--output", str(output)]) == 0
    printed, found = capsys.readouterr().out, json.loads(output.read_bytes())
    assert [row["speed"] for row in found["rows"]] == ["fast", "plain"]
    for row in found["rows"]:
        low, middle, high = row["images_per_second"]
        assert low == middle == high  # of one round
        assert row["ratio"][1] == pytest.approx(middle / row["reference_images_per_second"][1])
        assert row["gflops"] == pytest.approx(6 * 46.45e6 * middle / 1e9, rel=0.05)  # MobileNet's 46 million MACs
        assert row["share_of_peak"] == pytest.approx(row["gflops"] / row["peak_gflops"])
        assert row["seconds_per_epoch"] > 50_000 / middle
        assert (
            row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 128 * 32 * 32 * 32 * 4
        )  # one layer's output
        assert f"{row['ratio'][1]:.3g}" in printed
    assert set(found["projected_seconds"]) == set(EXHIBITS) and min(found["projected_seconds"].values()) > 0
    assert all(name in printed for name in EXHIBITS)
