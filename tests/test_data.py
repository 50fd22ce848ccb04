"""The data sets, their splits, augmentation and normalisation; made-up files where the real ones are not needed."""

import pickle
import struct
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from silalib import data
from silalib.data import DATASETS, DatasetSpec, Split, balanced_order, normalisation, splits
from silalib.data.augment import Normalise, crop_flip, epoch_plan, pad
from silalib.errors import MissingData, UserError

CPU = torch.device("cpu")


# -- digits


def test_digits():
    from sklearn.datasets import load_digits

    whole, raw = data.load("digits"), load_digits()
    assert whole.train_images.shape == (1297, 1, 32, 32)
    assert whole.test_images.shape == (500, 1, 32, 32)
    assert whole.train_images.dtype == whole.test_images.dtype == torch.uint8
    assert whole.train_labels.dtype == whole.test_labels.dtype == torch.int64
    assert torch.cat([whole.train_labels, whole.test_labels]).tolist() == raw.target.tolist()
    # bilinear: each output pixel's centre lies at (o + 1/2) / 4 - 1/2 in the scan, whose border is repeated
    weights = np.zeros((32, 8))
    for o in range(32):
        place = min(max((o + 0.5) / 4 - 0.5, 0), 7)
        left = min(int(place), 6)
        weights[o, left : left + 2] = 1 - (place - left), place - left
    enlarged = weights @ (raw.images * 255 / 16) @ weights.T
    ours = torch.cat([whole.train_images, whole.test_images])[:, 0]
    np.testing.assert_allclose(ours, enlarged, rtol=0, atol=0.501)


def test_digits_are_the_same_at_every_load():
    first = data.load("digits")
    data.load.cache_clear()
    second = data.load("digits")
    assert first is not second
    assert first.checksum == second.checksum
    assert len(first.checksum) == 64
    assert torch.equal(first.train_images, second.train_images)


@pytest.fixture
def own_datasets():
    """DATASETS, to which a test may add or change some."""
    with mock.patch.dict(DATASETS):
        yield DATASETS
    data.load.cache_clear()


def test_checksum_covers_pixels_and_labels(own_datasets):
    checksums = set()
    for changed in (None, 0, 1, 2, 3):
        arrays = [torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2).long()] * 2
        if changed is not None:
            arrays[changed] = arrays[changed] + 1
        own_datasets["made up"] = DatasetSpec("made up", 2, (1, 2, 2), 2, 2, read=lambda arrays=arrays: arrays)
        data.load.cache_clear()
        checksums.add(data.load("made up").checksum)
    assert len(checksums) == 5


def test_unknown_data_set():
    with pytest.raises(UserError, match=r"unknown data set 'imagenet'.*digits"):
        data.load("imagenet")


# -- files on disk


@pytest.mark.parametrize("name", ["cifar100", "cifar10", "mnist"])
def test_missing_data_without_a_network(name, data_folder, no_network, capsys):
    with pytest.raises(MissingData) as caught:
        data.load(name)
    message = str(caught.value)
    assert "\n" not in message
    assert str(data_folder / DATASETS[name].folder) in message
    assert "missing" in message
    assert no_network  # it was tried


def test_download_looks_before_it_loads(data_folder, no_network):
    data.download("digits")
    with pytest.raises(MissingData):
        data.download("cifar100")
    (data_folder / DATASETS["mnist"].folder).mkdir(parents=True)
    (data_folder / DATASETS["mnist"].folder / "some-file").touch()
    tried = len(no_network)
    data.download("mnist")
    assert len(no_network) == tried


def test_damaged_cifar_without_a_network(data_folder, no_network, capsys):
    folder = data_folder / DATASETS["cifar100"].folder
    folder.mkdir(parents=True)
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"this is not CIFAR")
    with pytest.raises(UserError) as caught:
        data.load("cifar100")
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert "damaged" in message


def test_cifar_files_are_read_in_the_right_order(data_folder, own_datasets, monkeypatch):
    """CIFAR's rows of 3072 bytes hold the red plane first, row by row."""
    from silalib.data._torchvision import torchvision

    rng = np.random.default_rng(0)
    rows = {"train": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "test": rng.integers(0, 256, (3, 3072), np.uint8)}
    labels = {"train": [5, 99, 0, 7], "test": [1, 2, 3]}
    folder = data_folder / DATASETS["cifar100"].folder
    folder.mkdir(parents=True)
    for split in rows:
        content = {"data": rows[split], "fine_labels": labels[split], "coarse_labels": [0] * len(labels[split])}
        (folder / split).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    own_datasets["cifar100"] = replace(DATASETS["cifar100"], sha256=None)
    whole = data.load("cifar100")
    assert whole.train_labels.tolist() == labels["train"]
    assert whole.test_labels.tolist() == labels["test"]
    assert np.array_equal(whole.train_images, rows["train"].reshape(-1, 3, 32, 32))
    assert np.array_equal(whole.test_images, rows["test"].reshape(-1, 3, 32, 32))


def write_mnist(data_folder):
    """Made-up files in MNIST's format; returns their pixels and labels."""
    rng = np.random.default_rng(0)
    folder = data_folder / DATASETS["mnist"].folder
    folder.mkdir(parents=True)
    expected = {}
    for name, n in [("train", 4), ("t10k", 3)]:
        pixels, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, n, 28, 28) + pixels.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, n) + labels.tobytes())
        expected[name] = pixels, labels
    return expected


def test_what_is_not_the_published_data_is_set_aside(data_folder, no_network, capsys):
    write_mnist(data_folder)
    folder = data_folder / DATASETS["mnist"].folder
    with pytest.raises(MissingData, match=r"raw is damaged \(it is now raw\.corrupt\): put MNIST there") as caught:
        data.load("mnist")
    assert "\n" not in str(caught.value) and no_network
    assert [path.name for path in folder.parent.iterdir()].count("raw.corrupt") == 1


def test_mnist_files_are_read(data_folder, own_datasets):
    expected = write_mnist(data_folder)
    own_datasets["mnist"] = replace(DATASETS["mnist"], sha256=None)
    whole = data.load("mnist")
    assert whole.train_images.shape == (4, 1, 28, 28)
    assert np.array_equal(whole.train_images[:, 0], expected["train"][0])
    assert np.array_equal(whole.test_images[:, 0], expected["t10k"][0])
    assert whole.train_labels.tolist() == expected["train"][1].tolist()
    assert whole.test_labels.tolist() == expected["t10k"][1].tolist()


def test_real_cifar100(real_data):
    whole = real_data("cifar100")
    assert whole.train_images.shape == (50000, 3, 32, 32)
    assert whole.test_images.shape == (10000, 3, 32, 32)
    assert whole.train_labels.bincount().tolist() == [500] * 100
    assert whole.test_labels.bincount().tolist() == [100] * 100
    # the channel means of the training images that the literature normalises with
    mean, std = normalisation(Split(whole.train_images.permute(0, 2, 3, 1), whole.train_labels))
    torch.testing.assert_close(mean, torch.tensor([0.5071, 0.4865, 0.4409]), rtol=0, atol=1e-3)
    torch.testing.assert_close(std, torch.tensor([0.2673, 0.2564, 0.2762]), rtol=0, atol=1e-3)


def test_real_mnist(real_data):
    whole = real_data("mnist")
    assert whole.train_images.shape == (60000, 1, 28, 28)
    assert whole.test_images.shape == (10000, 1, 28, 28)
    # as published with the data set
    assert whole.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert whole.test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    mean, std = normalisation(Split(whole.train_images.permute(0, 2, 3, 1), whole.train_labels))
    assert (mean.item(), std.item()) == pytest.approx((0.1307, 0.3081), abs=1e-4)


# -- splits


def shuffled_labels(classes, each, seed=1):
    labels = torch.arange(classes).repeat(each)
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def test_balanced_order_has_balanced_prefixes():
    labels = shuffled_labels(classes=7, each=11)
    order = balanced_order(labels)
    assert sorted(order.tolist()) == list(range(77))
    for k in range(1, 12):
        assert labels[order[: 7 * k]].bincount(minlength=7).tolist() == [k] * 7
    assert torch.equal(order, balanced_order(labels))
    # within a class the order is not that of the files
    first_class = order[labels[order] == 0]
    assert first_class.tolist() != sorted(first_class.tolist())
    assert not torch.equal(order, balanced_order(labels, seed=1))


def test_balanced_order_of_uneven_classes_is_a_permutation():
    labels = torch.tensor([2, 0, 0, 2, 2, 3, 0, 2])  # class 1 has no image
    order = balanced_order(labels)
    assert sorted(order.tolist()) == list(range(8))
    assert sorted(labels[order[:3]].tolist()) == [0, 2, 3]
    assert sorted(labels[order[3:5]].tolist()) == [0, 2]


@pytest.fixture
def numbered(own_datasets):
    """The Images of a data set "numbered", 200 balanced images of one pixel whose value is their number."""
    pixels = torch.arange(200, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    arrays = pixels, shuffled_labels(10, 20), 255 - pixels[:50], shuffled_labels(10, 5)
    own_datasets["numbered"] = DatasetSpec("numbered", 10, (1, 1, 1), 200, 50, read=lambda: arrays)
    return data.load("numbered")


def numbers(split):
    return split.images.flatten().tolist()


def test_splits_are_balanced_disjoint_and_the_same_for_every_seed(tiny, numbered):
    parts, checksum = splits(tiny(dataset="numbered", train_size=100, holdout=50), CPU)
    assert checksum == numbered.checksum
    assert {name: len(part) for name, part in parts.items()} == {"train": 100, "holdout": 50, "test": 50}
    for name, count in [("train", 10), ("holdout", 5), ("test", 5)]:
        assert parts[name].labels.bincount().tolist() == [count] * 10
        assert parts[name].images.dtype == torch.uint8
    assert not set(numbers(parts["train"])) & set(numbers(parts["holdout"]))
    for name in ("train", "holdout"):
        assert torch.equal(parts[name].labels, numbered.train_labels[numbers(parts[name])])
    assert numbers(parts["test"]) == numbered.test_images.flatten().tolist()
    other, _ = splits(tiny(dataset="numbered", train_size=100, holdout=50, seed=5), CPU)
    assert all(numbers(other[name]) == numbers(parts[name]) for name in parts)


@pytest.mark.parametrize("holdout", [0, 30])
def test_a_smaller_training_set_is_part_of_a_larger_one(holdout, tiny, numbered):
    parts = [splits(tiny(dataset="numbered", train_size=n, holdout=holdout), CPU)[0] for n in (50, 100)]
    small, large = (set(numbers(part["train"])) for part in parts)
    assert small < large
    assert numbers(parts[0]["holdout"]) == numbers(parts[1]["holdout"])


def test_all_that_is_not_held_out_is_trained_on(tiny, numbered):
    parts, _ = splits(tiny(dataset="numbered", train_size=None, holdout=30), CPU)
    assert sorted(numbers(parts["train"]) + numbers(parts["holdout"])) == list(range(200))
    assert len(parts["holdout"]) == 30
    parts, _ = splits(tiny(dataset="numbered", train_size=None), CPU)
    assert numbers(parts["train"]) == list(range(200))
    assert len(parts["holdout"]) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"train_size": 201},
        {"train_size": 151, "holdout": 50},
        {"train_size": None, "holdout": 200},
        {"train_size": None, "holdout": 999},
    ],
)
def test_too_large_a_split_is_refused(changes, tiny, numbered):
    with pytest.raises(UserError, match="numbered has 200 images") as caught:
        splits(tiny(dataset="numbered", **changes), CPU)
    assert "\n" not in str(caught.value)


def test_the_largest_split_is_not_refused(tiny, numbered):
    parts, _ = splits(tiny(dataset="numbered", train_size=150, holdout=50), CPU)
    assert (len(parts["train"]), len(parts["holdout"])) == (150, 50)


def test_digits_splits_are_nearly_balanced(tiny):
    """The digits' classes differ a little in size; a subset's differ by one image at most."""
    parts, _ = splits(tiny(train_size=320, holdout=100), CPU)
    assert parts["train"].images.shape == (320, 32, 32, 1)
    assert parts["test"].images.is_contiguous()
    for name in ("train", "holdout"):
        counts = parts[name].labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 1, name


# -- augmentation


def test_crop_flip_against_a_loop():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 7, 5, 3), np.uint8)  # not square, so that a swapped axis shows
    index = np.array([3, 0, 5, 5, 1, 3, 2])
    offset = np.array([[0, 0], [8, 8], [4, 4], [0, 8], [8, 0], [3, 6], [5, 1]])
    flip = np.array([False, False, False, False, True, True, True])
    padded = pad(torch.from_numpy(images), "crop")
    assert padded.shape == (6, 15, 13, 3)
    actual = crop_flip(padded, *map(torch.from_numpy, (index, offset, flip)), (7, 5))
    assert actual.dtype == torch.uint8
    for i, (y, x), mirrored, ours in zip(index, offset, flip, actual.numpy()):
        bordered = np.zeros((15, 13, 3), np.uint8)
        bordered[4:11, 4:9] = images[i]
        expected = bordered[y : y + 7, x : x + 5]
        assert np.array_equal(ours, expected[:, ::-1] if mirrored else expected)


@pytest.mark.parametrize("augment", ["none", "crop", "flip", "crop+flip"])
def test_epoch_plan_draws_what_is_asked_for(augment, tiny):
    run = tiny(augment=augment)
    order, offset, flip = epoch_plan(run, 3, 2000, CPU)
    assert sorted(order.tolist()) == list(range(2000))
    assert order.tolist() != list(range(2000))
    assert offset.shape == (2000, 2)
    if "crop" not in augment:
        assert not offset.any()
        images = torch.arange(2000 * 4, dtype=torch.int32).to(torch.uint8).reshape(2000, 2, 2, 1)
        expected = torch.where(flip[:, None, None, None], images[order].flip(2), images[order])
        assert torch.equal(crop_flip(pad(images, augment), order, offset, flip, (2, 2)), expected)
    else:
        # uniform on 0 to 8 in both directions: 222 of each, give or take
        counts = torch.stack([offset[:, axis].bincount(minlength=9) for axis in (0, 1)])
        assert counts.shape == (2, 9)
        assert counts.min() > 150 and counts.max() < 300
        assert abs(np.corrcoef(offset.T)[0, 1]) < 0.1
    if "flip" in augment:
        assert 900 < flip.sum() < 1100
    else:
        assert not flip.any()


def test_epoch_plan_depends_on_seed_and_epoch_alone(tiny):
    run = tiny(augment="crop+flip")
    plan = lambda run, epoch: epoch_plan(run, epoch, 100, CPU)
    first = plan(run, 1)
    torch.manual_seed(99)
    same = tiny(augment="crop+flip", nets=("mobilenet",), method="ind", epochs=7, lr=0.2)
    assert all(map(torch.equal, first, plan(same, 1)))
    for other in (plan(run, 2), plan(replace(run, seed=1), 1)):
        assert not any(map(torch.equal, first, other))


# -- normalisation


def test_normalisation_and_normalise_against_numpy():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 6, 7, 3), np.uint8) // np.array([1, 2, 5], np.uint8)
    mean, std = normalisation(Split(torch.from_numpy(images), torch.zeros(5)))
    pixels = images.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-6)
    expected = ((images / 255 - pixels.mean(0)) / pixels.std(0)).transpose(0, 3, 1, 2)
    normalise = Normalise(mean, std)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    for x in (batch, batch.contiguous(), batch.float() / 255, batch.double() / 255):
        ours = normalise(x)
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_normalise_against_torchvision():
    from silalib.data._torchvision import torchvision  # noqa: F401

    v2 = pytest.importorskip("torchvision.transforms.v2")
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    batch = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])(batch)
    torch.testing.assert_close(Normalise(torch.tensor(mean), torch.tensor(std))(batch), theirs)
