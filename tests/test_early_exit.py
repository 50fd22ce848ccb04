"""Costs, thresholds and budgeted evaluation against loops over samples; early exit that really stops."""

import math
import shutil

import numpy as np
import pytest
import torch
from conftest import train

from silalib import early_exit, experiments
from silalib.analysis import tables
from silalib.early_exit import (
    EarlyExit,
    distribution_for,
    evaluate,
    exit_costs,
    exit_distribution,
    exit_index,
    thresholds,
    truncated_msdnet,
)
from silalib.errors import UserError
from silalib.models import EXITS, MODELS, count_macs
from silalib.records import load, load_network, state


@pytest.fixture(scope="module")
def network():
    """An untrained MSDNet with five exits whose BatchNorm has seen some images; its logits spread over a range."""
    torch.manual_seed(0)
    network = MODELS["msdnet_budgeted"](10, 1, 0.25)
    for _ in range(3):
        network(torch.randn(32, 1, 32, 32))
    for classifier in network.classifiers:
        torch.nn.init.normal_(classifier.fc.weight, std=0.3)
    return network.eval()


# -- costs


def test_costs_of_the_anytime_network():
    """Blocks alone, cumulative, and classifiers, in millions of MACs, at 100 classes and 3x32x32."""
    blocks = [11.416, 17.271, 25.609, 30.733, 36.742, 42.933, 47.603]
    classifiers = [3.552, 4.436, 3.183, 4.068, 4.953, 3.404, 4.289]
    with torch.device("meta"):
        ours = exit_costs(MODELS["msdnet_anytime"](100), (3, 32, 32))
    assert [n / 1e6 for n in ours] == pytest.approx([b + c for b, c in zip(blocks, classifiers)], abs=0.0011)


def test_costs_of_the_budgeted_network():
    blocks = [4.568, 8.875, 19.425, 29.231, 41.509]
    classifiers = [2.225, 3.109, 2.520, 4.289, 4.436]
    with torch.device("meta"):
        ours = exit_costs(MODELS["msdnet_budgeted"](100), (3, 32, 32), budgeted=True)
    assert [n / 1e6 for n in ours] == pytest.approx(list(blocks + np.cumsum(classifiers)), abs=0.0035)


@pytest.mark.parametrize("name, width", [(name, 1.0 if name == "msdnet_imagenet" else 0.125) for name in EXITS])
def test_costs_increase_and_the_count_can_be_repeated(name, width):
    """At full width the costs of the other two are those published, above."""
    image = (3, 224, 224) if name == "msdnet_imagenet" else (3, 32, 32)
    with torch.device("meta"):
        network = MODELS[name](100, width=width)
    for budgeted in (False, True):
        costs = exit_costs(network, image, budgeted)
        assert costs == exit_costs(network, image, budgeted)
        assert len(costs) == EXITS[name] and costs == sorted(set(costs))
    assert costs[-1] == count_macs(network, image)  # the last image passes every layer


def test_a_network_without_exits_has_one_cost():
    network = MODELS["convnet12"](10, 1, 0.125)
    assert exit_costs(network, (1, 28, 28)) == [count_macs(network, (1, 28, 28))]


# -- thresholds, sample by sample


def plain_thresholds(confidence, shares):
    """Exit after exit, the most confident samples that are left go until as many have gone as should have."""
    n, limits, gone = len(confidence[0]), [], set()
    for k in range(len(confidence) - 1):
        should_be_gone = round(n * sum(shares[: k + 1]))
        limit = math.inf
        for i in sorted((i for i in range(n) if i not in gone), key=lambda i: -confidence[k][i]):
            if len(gone) >= should_be_gone and confidence[k][i] < limit:
                break
            limit = confidence[k][i]
            gone.add(i)
        limits.append(limit)
    return [*limits, -math.inf]


def plain_evaluation(confidence, correct, limits, costs):
    left, hits, spent = [0] * len(costs), 0, 0
    for i in range(len(confidence[0])):
        for k in range(len(costs)):
            if confidence[k][i] >= limits[k] or k == len(costs) - 1:
                left[k], hits, spent = left[k] + 1, hits + correct[k][i], spent + costs[k]
                break
    n = len(confidence[0])
    return {"top1": 100 * hits / n, "macs": spent / n, "shares": [c / n for c in left]}


def samples(kind, exits, n, seed):
    g = np.random.default_rng(seed)
    confidence = g.beta(2, 1, (exits, n)).astype(np.float32)
    if kind == "tied":
        confidence = np.ceil(confidence * 6) / np.float32(6)
    elif kind == "all equal":
        confidence[:] = 1
    return confidence, g.random((exits, n)) < 0.7


@pytest.mark.parametrize("kind", ["random", "tied", "all equal"])
@pytest.mark.parametrize("exits, n", [(5, 997), (7, 200), (2, 10), (3, 1), (1, 5)])
def test_thresholds_and_evaluation_are_those_of_a_plain_loop(kind, exits, n):
    costs = [3 * k + 2.0 for k in range(exits)]
    for seed, q in enumerate((0.05, 0.4, 1, 2.3, 20)):
        confidence, correct = samples(kind, exits, n, seed)
        test, test_correct = samples(kind, exits, 301, 100 + seed)
        shares = exit_distribution(q, exits)
        limits = thresholds(confidence, shares)
        assert limits.tolist() == plain_thresholds(confidence.tolist(), shares.tolist())
        for c, hit in ((confidence, correct), (test, test_correct)):
            expected = plain_evaluation(c.tolist(), hit.tolist(), limits.tolist(), costs)
            result = evaluate(c, hit, limits, costs)
            assert result["top1"] == pytest.approx(expected["top1"])
            assert result["macs"] == pytest.approx(expected["macs"])
            assert result["shares"].tolist() == pytest.approx(expected["shares"])


@pytest.mark.parametrize("shares", [(0.2, 0.3, 0.5), (0, 0.5, 0.5), (1, 0, 0), (0, 0, 1), (0.33333, 0.33333, 0.33334)])
def test_the_asked_fractions_are_realised(shares):
    confidence, _ = samples("random", 3, 1000, 0)
    assert len(np.unique(confidence[0])) == 1000
    left = np.bincount(exit_index(confidence, thresholds(confidence, shares)), minlength=3)
    assert left.tolist() == pytest.approx([1000 * s for s in shares], abs=1)


def test_ties_leave_together_and_later_exits_make_up_for_it():
    confidence = np.array([[0.9, 0.9, 0.9, 0.5, 0.4, 0.3], [0.1, 0.1, 0.1, 0.8, 0.7, 0.6], [0.5] * 6])
    limits = thresholds(confidence, (1 / 6, 1 / 2, 1 / 3))
    assert limits.tolist() == [0.9, 0.8, -math.inf]
    assert exit_index(confidence, limits).tolist() == [0, 0, 0, 1, 2, 2]


def test_a_confidence_that_is_no_number_goes_to_the_last_exit():
    confidence = np.array([[np.nan, 0.9], [np.nan, np.nan]])
    assert exit_index(confidence, [0.5, -math.inf]).tolist() == [1, 0]


def test_no_samples_cannot_be_evaluated():
    with pytest.raises(UserError, match="no samples to evaluate"):
        evaluate(np.empty((2, 0)), np.empty((2, 0), bool), [0.5, -math.inf], [1, 2])


def test_shares_that_are_none_are_refused():
    confidence, _ = samples("random", 3, 10, 0)
    for shares in [(0.5, 0.5), (0.5, 0.5, 0.5), (-0.5, 0.5, 1), (np.nan, 0.5, 0.5)]:
        with pytest.raises(ValueError, match="give one for each of 3 exits"):
            thresholds(confidence, shares)


def test_fractions_are_proportional_to_powers_of_q():
    assert exit_distribution(1, 4).tolist() == [0.25] * 4
    assert exit_distribution(2, 3).tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert exit_distribution(0.5, 3).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert exit_distribution(1e300, 7).tolist() == pytest.approx([0] * 6 + [1])
    for q in (0, -1, math.nan, math.inf):
        with pytest.raises(UserError, match="q must be a number above 0"):
            exit_distribution(q, 3)


# -- budgets


def test_fractions_for_a_budget_spend_it():
    costs = [10, 15, 40, 70]
    for budget in (10, 10.0001, 12, 33.75, 60, 69.9999, 70):  # 33.75 is the mean: equal shares
        shares = distribution_for(budget, costs)
        assert shares.sum() == pytest.approx(1) and shares.min() >= 0
        assert shares @ costs == pytest.approx(budget, rel=1e-6)
    assert distribution_for(33.75, costs) == pytest.approx([0.25] * 4)


def test_a_budget_a_rounding_error_away_from_a_cost():
    costs = [10.0, 15.0, 40.0, 70.0]
    assert distribution_for(np.nextafter(10.0, 11), costs) == pytest.approx([1, 0, 0, 0])
    assert distribution_for(np.nextafter(70.0, 69), costs) == pytest.approx([0, 0, 0, 1])


def test_a_budget_outside_of_the_exits_costs():
    assert distribution_for(1000, [10, 20, 30]).tolist() == [0, 0, 1]
    assert distribution_for(math.inf, [10, 20, 30]).tolist() == [0, 0, 1]
    for budget in (9.99, 0, -1, math.nan, -math.inf):
        with pytest.raises(UserError, match="is below the first exit's cost, 10"):
            distribution_for(budget, [10, 20, 30])


# -- inference that stops


def plain_early_exit(network, images, limits):
    """In hindsight: the logits of every exit for every image, then the first exit that is confident enough."""
    with torch.no_grad():
        logits = torch.stack(network(images))
    confidence = logits.softmax(2).amax(2).numpy()
    exits = exit_index(confidence, limits)
    return logits[exits, torch.arange(len(images))], exits, confidence


def count_samples(modules):
    """Of each module how many samples entered it; filled while it runs."""
    counts = [0] * len(modules)

    def hook(k):
        def add(module, inputs):
            first = inputs[0][0] if isinstance(inputs[0], list) else inputs[0]
            counts[k] += len(first)

        return add

    return counts, [m.register_forward_pre_hook(hook(k)) for k, m in enumerate(modules)]


@pytest.mark.parametrize("q, batch", [(0.1, 1), (1, 7), (5, 120), (0.1, 120)])
def test_early_exit_is_the_simulation_in_hindsight(network, q, batch):
    images = torch.randn(120, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    confidence = plain_early_exit(network, images, [0] * 5)[2]
    limits = thresholds(confidence, exit_distribution(q, 5))
    logits, exits, _ = plain_early_exit(network, images, limits)
    counts, hooks = count_samples([*network.blocks, *network.classifiers])
    model = EarlyExit(network, limits)
    parts = [model(part) for part in images.split(batch)]
    for hook in hooks:
        hook.remove()
    ours, left = (torch.cat(p) for p in zip(*parts))
    # a rounding error can send a sample on whose confidence is a threshold to the last digits
    near = (np.abs(confidence[:-1] - limits[:-1, None]) < 1e-5).any(0)
    assert near.sum() <= 4 + 2  # the threshold of every exit is the confidence of one sample
    same = ~near
    assert left.numpy()[same].tolist() == exits[same].tolist()
    torch.testing.assert_close(ours[same], logits[same], rtol=1e-4, atol=1e-5)
    assert ours.argmax(1)[same].tolist() == logits.argmax(1)[same].tolist()
    entered = [int((left >= k).sum()) for k in range(5)]
    assert counts == entered * 2
    assert entered[0] == 120 and entered[-1] < 120


def test_nothing_is_computed_once_all_have_left(network):
    images = torch.randn(6, 1, 32, 32)
    counts, hooks = count_samples(network.blocks)
    logits, exits = EarlyExit(network, [math.inf, 0, math.inf, math.inf, -math.inf])(images)
    for hook in hooks:
        hook.remove()
    assert counts == [6, 6, 0, 0, 0]
    assert exits.tolist() == [1] * 6
    torch.testing.assert_close(logits, network(images)[1].detach(), rtol=1e-4, atol=1e-5)


def test_without_thresholds_to_reach_everything_runs_to_the_end(network):
    images = torch.randn(4, 1, 32, 32)
    logits, exits = EarlyExit(network, [math.inf] * 5)(images)
    assert exits.tolist() == [4] * 4  # the last exit takes the rest, whatever its threshold
    torch.testing.assert_close(logits, network(images)[4].detach(), rtol=1e-4, atol=1e-5)


def test_an_image_whose_confidence_is_no_number_runs_to_the_end(network):
    images = torch.randn(3, 1, 32, 32)
    images[1] = math.nan
    limits = [0.0, 0.0, 0.0, 0.0, -math.inf]  # every number reaches the first threshold
    logits, exits = EarlyExit(network, limits)(images)
    assert exits.tolist() == plain_early_exit(network, images, limits)[1].tolist() == [0, 4, 0]
    assert logits[1].isnan().all() and logits[[0, 2]].isfinite().all()


def test_anytime_prediction_ends_at_its_exit(network):
    images = torch.randn(4, 1, 32, 32)
    for exit in range(5):
        counts, hooks = count_samples([*network.blocks, *network.classifiers])
        logits = truncated_msdnet(network, exit)(images)
        for hook in hooks:
            hook.remove()
        assert counts == [4 * (k <= exit) for k in range(5)] + [4 * (k == exit) for k in range(5)]
        torch.testing.assert_close(logits, network(images)[exit].detach(), rtol=1e-4, atol=1e-5)


def test_what_cannot_exit_early_is_refused(network):
    with pytest.raises(ValueError, match="2 thresholds for 5 exits"):
        EarlyExit(network, [0.5, 0])
    for model in (MODELS["convnet12"](10), torch.nn.Sequential(torch.nn.Identity(), torch.nn.Flatten())):
        with pytest.raises(UserError, match="early exit needs an MSDNet"):
            EarlyExit(model, [0.5])
    for exit in (-1, 5, 9):
        with pytest.raises(UserError, match=f"exit {exit}: this network has exits 0 to 4"):
            truncated_msdnet(network, exit)


def test_milliseconds_runs_every_image_in_its_repeats():
    seen = []
    assert early_exit.milliseconds(lambda batch: seen.append(len(batch)), torch.zeros(10, 1), 4, repeats=2) >= 0
    assert seen == [4] + [4, 4, 2] * 2


# -- from a record


@pytest.fixture(scope="module")
def budgeted_run(tiny, tmp_path_factory):
    run = tiny(nets="msdnet_budgeted", blocks=3, holdout=100, epochs=1)
    train(run, folder := tmp_path_factory.mktemp("budgeted") / run.key, bf16=False)
    return run, folder


@pytest.fixture
def budgeted_record(budgeted_run, results):
    run, folder = budgeted_run
    shutil.copytree(folder, results / "quick" / "runs" / run.key)
    return load(run)


def test_budgeted_curve_of_a_record(budgeted_record):
    """By another way: thresholds from the network on the held-out images, each test image on its own."""
    from silalib import data

    run, record = budgeted_record.run, budgeted_record
    split = data.splits(run, torch.device("cpu"))[0]
    network = load_network(run)
    probabilities = {}
    with torch.no_grad():
        for name in ("holdout", "test"):
            logits = torch.stack(network(split[name].images.permute(0, 3, 1, 2)))
            probabilities[name] = logits.softmax(2).double().numpy()
    costs = [head["macs_budgeted"] for head in record.heads]
    assert costs == exit_costs(network[1], (1, 32, 32), budgeted=True)
    curve = early_exit.budgeted(record)
    assert len(curve) == 41 and curve["macs"].between(costs[0], costs[-1]).all() and curve["top1"].notna().all()
    assert curve["macs"].iloc[0] < curve["macs"].iloc[20] < curve["macs"].iloc[-1]
    labels = split["test"].labels.numpy()
    for row in curve.iloc[::8].to_dict("records"):
        held, test = (probabilities[name].max(2) for name in ("holdout", "test"))
        limits = plain_thresholds(held.tolist(), exit_distribution(row["q"], 3).tolist())
        np.testing.assert_allclose(row["thresholds"], limits, atol=1e-5)
        correct = probabilities["test"].argmax(2) == labels
        expected = plain_evaluation(test.tolist(), correct.tolist(), limits, costs)
        # a few of 500 images can lie at a threshold
        assert row["top1"] == pytest.approx(expected["top1"], abs=0.81)
        assert row["shares"] == pytest.approx(expected["shares"], abs=0.0081)


def test_real_early_exit_is_what_the_record_says(budgeted_record):
    from silalib import data

    confidence, predicted, _ = early_exit.exit_predictions(budgeted_record, "test")
    limits = thresholds(early_exit.exit_predictions(budgeted_record, "calibration")[0], exit_distribution(1, 3))
    logits, left = EarlyExit(load_network(budgeted_record.run), limits)(data.load("digits").test_images)
    exits = exit_index(confidence, limits)
    near = (np.abs(confidence[:-1] - limits[:-1, None]) < 1e-5).any(0)
    assert near.sum() < 5
    assert (left.numpy() == exits)[~near].all()
    assert (logits.argmax(1).numpy() == predicted[exits, np.arange(500)])[~near].mean() > 0.99


def test_anytime_curve_of_a_record(budgeted_record):
    curve = early_exit.anytime(budgeted_record)
    assert curve["exit"].tolist() == [0, 1, 2]
    assert curve["macs"].tolist() == exit_costs(load_network(budgeted_record.run)[1], (1, 32, 32))
    last = budgeted_record.history.tail(3)
    assert curve["top1"].tolist() == last["test_top1"].tolist()
    assert curve["nll"].tolist() == last["test_nll"].tolist()


def test_the_curve_is_read_as_it_was_measured(budgeted_record):
    """To the last bit: a threshold is one of the confidences, and images at it must not change sides."""
    curve = early_exit.budgeted(budgeted_record)
    held = early_exit.exit_predictions(budgeted_record, "calibration")[0]
    confidence, predicted, labels = early_exit.exit_predictions(budgeted_record, "test")
    for row in curve.to_dict("records"):
        assert row["thresholds"] == thresholds(held, exit_distribution(row["q"], 3)).tolist()
        exits = exit_index(confidence, row["thresholds"])
        assert row["shares"] == (np.bincount(exits, minlength=3) / 500).tolist()
        assert row["top1"] == 100 * (predicted[exits, np.arange(500)] == labels).mean()


def test_without_what_it_made_of_each_image_the_curve_is_still_there(budgeted_record):
    curve = early_exit.budgeted(budgeted_record)
    (budgeted_record.path / "test.npz").unlink()
    record = load(budgeted_record.run)
    assert state(record.run) == "done" and early_exit.budgeted(record).equals(curve)
    with pytest.raises(UserError, match=r"test.npz of .* was not kept: delete .* and train the run again"):
        early_exit.exit_predictions(record, "test")
    (record.path / "test.npz").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"test\.npz is damaged"):
        load(record.run)


def test_a_run_that_held_nothing_out_has_no_budgeted_curve(record):
    with pytest.raises(UserError, match="held no images out to choose thresholds from"):
        early_exit.budgeted(record)


def test_gains_at_equal_costs_interpolate():
    import pandas as pd

    curve = pd.DataFrame({"macs": [30.0, 10.0, 20.0], "top1": [90.0, 50.0, 80.0]})
    nothing = pd.DataFrame({"macs": [10.0, 30.0], "top1": [0.0, 0.0]})
    assert tables.gains_at_equal_costs([curve], [nothing], 5).tolist() == [[50, 65, 80, 85, 90]]


def test_gains_at_equal_costs_by_hand():
    """All four curves reach 20 to 30 only: there the first is at 60, 65 and 70, its baseline at 50, 60 and 70."""
    import pandas as pd

    curve = pd.DataFrame({"macs": [10, 30], "top1": [50, 70]})
    baseline = pd.DataFrame({"macs": [40, 20], "top1": [90, 50]})
    flat = pd.DataFrame({"macs": [0, 100], "top1": [40, 40]})
    higher = pd.DataFrame({"macs": [0, 100], "top1": [43, 43]})
    gains = tables.gains_at_equal_costs([curve, higher], [baseline, flat], 3)
    assert gains.tolist() == [[10, 5, 0], [3, 3, 3]]
    # a seed that reaches less moves the costs of all: 25 to 30 only
    short = pd.DataFrame({"macs": [25, 30], "top1": [40, 40]})
    gains = tables.gains_at_equal_costs([curve, higher], [baseline, short], 3)
    assert gains.tolist() == [[5, 2.5, 0], [3, 3, 3]]
    apart = pd.DataFrame({"macs": [200, 300], "top1": [1, 2]})
    assert tables.gains_at_equal_costs([curve], [apart], 3).shape == (0, 3)
    assert tables.gains_at_equal_costs([], [], 3).shape == (0, 3)


# -- the curves of a grid


def test_curves_of_a_grid_have_every_network_and_method():
    grid = experiments.fig5("small", (0, 1))
    whole = ("cifar100", 7)  # anytime; the five blocks are those of Figure 4
    records = {
        run: f"{run.method} {run.seed}" for run in grid if run.n_heads == 7 and (run.method, run.seed) != ("sila", 0)
    }
    found = tables.exit_curves(grid, records, str.upper)
    assert list(found) == [("cifar100", 5), whole]
    assert found[whole] == {"ind": {0: "IND 0", 1: "IND 1"}, "sila": {1: "SILA 1"}}
    assert found["cifar100", 5] == {"ind": {}, "sila": {}}
