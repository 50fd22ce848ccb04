"""The fast settings give what the plain ones give; a captured function is replayed on what it is called with."""

import gc
import json

import numpy as np
import pytest
import torch
import train_step
from conftest import losses, train
from train_step import PLAIN

from silalib.experiments import EXHIBITS, cifar_run
from silalib.training import checkpoint, execution, measure, trainer
from silalib.training.execution import GraphedCallable, Speed

CPU = torch.device("cpu")
STEPS = 20


def first_losses(run, speed):
    """Training NLL of every head at each of the first 20 steps, (20, C)."""
    with torch.random.fork_rng():
        return losses(trainer.Training(run, CPU, speed), STEPS)


NETWORKS = {
    "resnet18": dict(nets=("resnet18",) * 2, width=0.125),
    "vgg13": dict(nets=("vgg13",), width=0.25, method="zero-peer"),
    "mobilenet": dict(nets=("mobilenet",), width=0.25, method="ind"),
    "wrn16_10": dict(nets=("wrn16_10",), width=0.0625, method="ind"),
    "exits": dict(nets=("msdnet_anytime",), width=0.25, blocks=2),
}


@pytest.mark.parametrize(
    "case",
    [
        *("resnet18", "vgg13", "exits"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet", "wrn16_10")),
        pytest.param("densenet121", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_fast_settings_follow_the_plain_path_for_20_steps(case, tiny):
    """Float32 differs by the order of sums alone, which dropout and pooling spread: 1 percent of the NLL at most, 0.1
    on average. bfloat16 has 8 bits: 10 percent at most, 3 on average. A small rate keeps the trajectory from chaos."""
    network = NETWORKS.get(case) or dict(nets=(case,), width=0.125, method="ind")
    run = tiny(train_size=128, epochs=5, lr=0.01, warmup=0.0, **network)
    plain = first_losses(run, PLAIN)
    assert plain[-4:].mean() < plain[:4].mean()  # it has learned something in between
    for bf16, largest, average in ((False, 0.01, 1e-3), (True, 0.1, 0.03)):
        fast = first_losses(run, Speed(bf16=bf16))
        error = (fast - plain).abs() / plain
        assert error.max() < largest
        assert error.mean() < average


def test_one_thread_gives_the_threads_back():
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), execution.one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.long
def test_fast_settings_end_as_accurate_as_the_plain_ones(tmp_path):
    """On digits, as Table 1's quick trains: the means of three pairs differ by less than twice the spread of a run."""
    top1 = {"fast": [], "plain": []}
    for seed in range(3):
        run = cifar_run("quick", ("resnet18", "resnet18"), method="sila", seed=seed)
        for name, settings in (("fast", Speed()), ("plain", PLAIN)):
            with torch.random.fork_rng():
                training = trainer.Training(run, CPU, settings)
                pauses = checkpoint.Pauses(training, tmp_path / f"{name}{seed}")
                training.loop(pauses)
                result, _ = measure.final(training, pauses)
            top1[name] += [head["top1"] for head in result["heads"]]
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

    captured = GraphedCallable(function, recorded)
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


def test_a_training_step_can_be_captured(tiny):
    """Nothing but the tensors given, and tensors that keep their place, changes between two steps: replaying the update
    on static inputs gives the weights of eager steps, to the last bit."""
    run = tiny(nets=("resnet18",) * 2, width=0.0625, train_size=128, epochs=5, augment="autoaugment")
    with torch.random.fork_rng():
        eager, training = (trainer.Training(run, CPU, Speed()) for _ in range(2))
        losses(eager, STEPS)
        training.captured_update = GraphedCallable(
            training.update, lambda function, inputs: (lambda: function(*inputs), None)
        )
        kept = [training.sums, *(p for net in training.nets.values() for p in net.parameters())]
        losses(training, 1)  # in which parameters keep their place too
        addresses = [t.data_ptr() for t in kept]
        losses(training, STEPS - 1)
        assert training.captured_update.replay and addresses == [t.data_ptr() for t in kept]
    for own, other in zip(training.nets.values(), eager.nets.values()):
        for name, value in own.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_a_learning_rate_in_a_tensor_is_the_same(tiny):
    """As on a GPU, where the captured step reads it; float32 holds 0.1 to seven digits."""
    run = tiny(nets=("resnet18",), method="ind", width=0.0625, train_size=128, epochs=5, lr=0.01)
    number, tensor = (trainer.Training(run, CPU, Speed(fused=False)) for _ in range(2))
    (group,) = tensor.optimizer.param_groups
    group["lr"] = torch.tensor(run.lr)
    assert torch.allclose(losses(tensor, STEPS), losses(number, STEPS), rtol=1e-4)
    last = trainer.learning_rate(run, STEPS - 1, tensor.steps_per_epoch)
    assert torch.is_tensor(group["lr"]) and group["lr"].item() == pytest.approx(last, rel=1e-6)


REAL = (torch.Tensor, torch.nn.Parameter)  # what other tests have compiled may have left others alive


@pytest.mark.slow
def test_memory_does_not_grow_over_50_epochs(tiny, tmp_path):
    """Counted where it is held: tensors alive, and their bytes, at the end of the second epoch and of the last."""
    alive = []

    def count(**message):
        if "top1" in message and message["step"] in (4, 100):
            gc.collect()
            tensors = {t.untyped_storage().data_ptr(): t for t in gc.get_objects() if type(t) in REAL}
            alive.append((len(tensors), sum(t.untyped_storage().nbytes() for t in tensors.values())))

    run = tiny(epochs=50)
    train(run, tmp_path / "run", progress=count)
    second, last = alive
    assert last == second


def test_the_memory_of_a_loop_is_its_own():
    """Three loops hold 100 bytes each and take up 10, 20 and 30 more in an epoch; all are in memory at once."""
    held, most, tested = [0], [0], []

    class Loop:
        def __init__(self, extra):
            self.extra = extra
            held[0] += 100

        def epoch(self):
            most[0] = max(most[0], held[0] + self.extra)

    class Tested(Loop):
        def test(self):
            tested.append(self.extra)

    def memory(device, reset=False):
        if reset:
            most[0] = held[0]
        return held[0], most[0]

    loops = {"reference": lambda: Loop(10), "fast": lambda: Tested(20), "plain": lambda: Tested(30)}
    _, times, _, bytes_used = train_step.measure(loops, CPU, 2, memory)
    assert bytes_used == {"reference": 110, "fast": 120, "plain": 130}
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(loops, 2)
    assert sorted(tested) == [20] * (4 + 2) + [30] * (4 + 2)  # warmed up, and captured, before it is timed


@pytest.mark.parametrize("options, message", [
    (["--nets", "msdnet_anytime", "--speeds", "quick"], "unknown speed 'quick': choose from fast"),
    (["--nets", "resnet19"], "unknown network 'resnet19': choose from"),
    (["--device", "tpu"], "unknown device 'tpu'"),
])  # fmt: skip
def test_train_step_refuses_what_it_does_not_know_in_one_line(options, message, capsys):
    assert train_step.main(options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("silalib: error: ") and message in line


def test_projected_time_is_cost_times_measured_speed():
    """Two rows: ResNet18 alone takes 2 s an epoch; its pair with SiLa 4 s, so 1040 s for 260 epochs.

    Figure 3 has IND's pair too, which was not measured and is taken at the mean speed of both: 1040 s."""
    row = lambda method, s: {"nets": "resnet18" if method == "ind" else "resnet18+resnet18", "speed": "fast",
                             "method": method, "seconds_per_epoch": s}  # fmt: skip
    assert train_step.projected([row("ind", 2), row("sila", 4)], "fast")["fig3"] == pytest.approx(2080)


@pytest.mark.slow
@pytest.mark.long
def test_train_step_prints_a_table_and_writes_what_it_rests_on(tmp_path, capsys):
    """One step each, so the values mean little; how they hang together is arithmetic."""
    output = tmp_path / "deep" / "bench.json"
    arguments = ["--nets", "mobilenet", "--methods", "ind", "--rounds", "1", "--steps", "1", "--device", "cpu"]
    assert train_step.main([*arguments, "--speeds", "fast", "plain", "--output", str(output)]) == 0
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
