"""Folders of images as data sets: what is decoded, interruptions, mistakes, and training on what stays on disk."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from silalib import data, files, records
from silalib.__main__ import main
from silalib.analysis import tables
from silalib.data import prepared
from silalib.data.augment import epoch_plan
from silalib.data.batches import MemoryMapped, TrainingBatches, in_batches
from silalib.errors import CorruptFile, MissingData, Stopped, UserError
from silalib.files import ROOT
from silalib.launch import estimate, prepare
from silalib.launch.ensure import ensure
from silalib.launch.prepare import list_images
from silalib.models import MODELS, count_macs
from silalib.run import Run
from silalib.training import trainer

CPU = torch.device("cpu")


def picture(seed, width=20, height=16):
    """A smooth RGB picture with a little noise, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return Image.fromarray((np.asarray(coarse) // 2 + rng.integers(0, 99, (height, width, 3))).astype(np.uint8))


def make_tree(root, classes=("ant", "bee", "cat"), train=4, val=2, size=(20, 16)):
    """train/<class>/*.jpg and val/<class>/*.png of pictures that can be told apart."""
    seed = 0
    for split, n, suffix in (("train", train, "jpg"), ("val", val, "png")):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                picture(seed := seed + 1, *size).save(root / split / name / f"{i}.{suffix}")
    return root


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "tree")


def content(folder):
    """The bytes of everything that a complete folder holds."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def expected_pixels(path, size):
    """What torchvision's usual evaluation transforms make of an image file."""
    from silalib.data._torchvision import torchvision

    t = torchvision.transforms
    return np.asarray(t.CenterCrop(size)(t.Resize(size)(Image.open(path).convert("RGB"))))


# -- pixels


@pytest.mark.parametrize("shape", [(500, 375), (333, 500), (224, 224), (100, 90), (256, 1000), (640, 97)])
def test_the_shorter_side_is_resized_and_the_centre_cut_out(shape, tmp_path):
    path = tmp_path / "picture.png"
    picture(0, *shape).save(path)
    assert np.array_equal(prepare.decode(path, 224), expected_pixels(path, 224))


@pytest.mark.parametrize("shape", [(500, 375), (333, 500), (256, 256), (100, 90)])
def test_imagenet_is_resized_to_a_square_and_the_centre_cut_out(shape, tmp_path):
    from silalib.data._torchvision import torchvision

    path = tmp_path / "picture.png"
    picture(0, *shape).save(path)
    t = torchvision.transforms
    ours = prepare.decode(path, 224, square=256)
    assert np.array_equal(ours, t.CenterCrop(224)(t.Resize((256, 256))(Image.open(path))))
    # and in floating point, without Pillow
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float()
    square = torch.nn.functional.interpolate(pixels, (256, 256), mode="bilinear", antialias=True)
    near = square[0, :, 16:240, 16:240].permute(1, 2, 0)
    np.testing.assert_allclose(ours, near, rtol=0, atol=1.01)


def test_an_image_of_the_size_is_not_touched(tmp_path):
    picture(3, 24, 24).save(tmp_path / "a.png")
    assert np.array_equal(prepare.decode(tmp_path / "a.png", 24), picture(3, 24, 24))


def flat(mode, colour, **options):
    file = io.BytesIO()
    Image.new(mode, (8, 8), colour).save(file, **options)
    return file


@pytest.mark.parametrize(
    "file, rgb",
    [
        (flat("L", 77, format="JPEG"), (77, 77, 77)),
        (flat("CMYK", (255, 0, 0, 0), format="JPEG", quality=100), (0, 255, 255)),
        (flat("CMYK", (0, 255, 255, 0), format="JPEG", quality=100), (255, 0, 0)),
        (flat("CMYK", (0, 0, 0, 255), format="JPEG", quality=100), (0, 0, 0)),
        (flat("RGBA", (10, 200, 30, 128), format="PNG"), (10, 200, 30)),
        (flat("LA", (60, 0), format="PNG"), (60, 60, 60)),
        (flat("1", 1, format="PNG"), (255, 255, 255)),
        (flat("I;16", 0x80FF, format="PNG"), (128, 128, 128)),
    ],
)
def test_every_mode_becomes_rgb(file, rgb):
    file.seek(0)
    pixels = prepare.decode(file, 8)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.astype(int), np.broadcast_to(rgb, (8, 8, 3)), rtol=0, atol=2)


def test_a_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([1, 2, 3, 200, 100, 50])
    image.save(tmp_path / "a.png", transparency=1)
    assert (prepare.decode(tmp_path / "a.png", 8) == (200, 100, 50)).all()


GRADIENT = np.arange(256, dtype=np.uint16).reshape(16, 16)


def stored(values, kind="TIFF", **tags):
    """An image file of these values; tags: names of TIFF's -> their values."""
    from PIL import TiffTags

    named = {info.name: number for number, info in TiffTags.TAGS_V2.items()}
    written = {"tiffinfo": {named[name]: value for name, value in tags.items()}} if tags else {}
    Image.fromarray(values).save(file := io.BytesIO(), kind, **written)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    "file",
    [
        stored(GRADIENT.astype(np.uint8)),
        stored(GRADIENT.astype(np.uint8), "PNG"),
        stored(GRADIENT * 257),
        stored(GRADIENT * 257, "PNG"),
        stored(GRADIENT * 257, "PPM"),
        stored(np.rint(GRADIENT * (16383 / 255)).astype(np.uint16), MaxSampleValue=16383),
        stored(np.rint(GRADIENT * (16383 / 255)).astype(np.int32), SMaxSampleValue=16383.0),
        stored(GRADIENT.astype(np.int32), SMaxSampleValue=255.0),
        stored(GRADIENT.astype(np.int32) * 257, SMaxSampleValue=65535.0),
        stored((GRADIENT / 255).astype(np.float32)),
        stored(GRADIENT.astype(np.float32), SMaxSampleValue=255.0),
        stored(GRADIENT.astype(np.float32) * 257, SMaxSampleValue=65535.0),
        stored((255 - GRADIENT) * 257, PhotometricInterpretation=0),  # white is zero
        stored(GRADIENT * 257, MaxSampleValue=64000),  # the largest of an image is no range
    ],
)
def test_one_gradient_in_every_format(file):
    np.testing.assert_array_equal(prepare.decode(file, 16), np.repeat(GRADIENT[..., None], 3, 2))


@pytest.mark.parametrize(
    "file",
    [
        stored(GRADIENT),  # 8 bits in 16, or a dark image
        stored(GRADIENT * 64),  # 14 bits in 16
        stored(GRADIENT.astype(np.int32)),
        stored(GRADIENT.astype(np.int32) * 257),
        stored(GRADIENT.astype(np.float32)),
        stored(GRADIENT.astype(np.float32) * 257),
        stored((GRADIENT / 255 - 0.5).astype(np.float32)),
        stored(np.where(GRADIENT == 9, np.nan, GRADIENT / 255).astype(np.float32)),
        stored(GRADIENT.astype(np.int32) * 257, SMaxSampleValue=255.0),
    ],
)
def test_a_range_that_cannot_be_told_is_refused(file):
    with pytest.raises(ValueError, match="pixels cannot be told: save it in 8 bits"):
        prepare.decode(file, 16)


def test_a_long_image_does_not_grow(tmp_path):
    """100,000 times as long as wide: resized as it is it would have 3 * 224 * 22 million bytes. Its middle is shown."""
    strip = np.zeros((1, 100_000, 3), np.uint8)
    strip[:, 49_900:50_100] = 200
    Image.fromarray(strip).save(tmp_path / "a.png")
    assert (prepare.decode(tmp_path / "a.png", 224) == 200).all()


# -- trees


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git", "lost+found"])
def test_what_programs_leave_is_no_data(name, tree):
    """At every level: beside train/ and val/, beside the classes, in a class and below."""
    before = prepare.list_images(tree)
    for place in (tree, tree / "train", tree / "val", tree / "train" / "ant", tree / "train" / "ant" / name):
        (place / name).mkdir()
        picture(0).save(place / name / "copy.png")
    picture(0).save(tree / "train" / "ant" / "._0.png")
    assert prepare.list_images(tree) == before


def test_a_prepared_folder(tree, data_folder, capsys):
    """Through the command line and worker processes, in the order of classes and names."""
    (tree / "train" / "ant" / "more").mkdir()
    picture(50).save(tree / "train" / "ant" / "more" / "5.JPEG")
    for name in ("notes.txt", ".hidden.jpg", "Thumbs.db"):
        (tree / "train" / "bee" / name).write_bytes(b"no image")
    arguments = ["data", "folder", "--from", str(tree), "--name", "insects", "--size", "12", "--workers", "1"]
    assert main(arguments) == 0
    assert f"insects: 13 training and 6 test images in {data_folder / 'insects'}, verified" in capsys.readouterr().out
    whole = data.load("insects")
    paths = {
        "train": [f"train/ant/{n}" for n in ("0.jpg", "1.jpg", "2.jpg", "3.jpg", "more/5.JPEG")]
        + [f"train/{c}/{i}.jpg" for c in ("bee", "cat") for i in range(4)],
        "test": [f"val/{c}/{i}.png" for c in ("ant", "bee", "cat") for i in range(2)],
    }
    for split, images in (("train", whole.train_images), ("test", whole.test_images)):
        assert np.array_equal(
            images.permute(0, 2, 3, 1), np.stack([expected_pixels(tree / p, 12) for p in paths[split]])
        )
    assert whole.train_labels.tolist() == [0] * 5 + [1] * 4 + [2] * 4
    assert whole.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    spec = data.dataset("insects")
    assert (spec.title, spec.classes, spec.image, spec.train, spec.test) == ("insects", 3, (3, 12, 12), 13, 6)
    assert prepared.describe(data_folder / "insects")["classes"] == ["ant", "bee", "cat"]
    assert set(content(data_folder / "insects")) == {*prepared.FILES, "dataset.json", "dataset.sha256"}
    # again: nothing is written, all is verified
    before = content(data_folder / "insects")
    for again in (arguments, ["data", "insects"]):
        assert main(again) == 0
        assert "13 training and 6 test images" in capsys.readouterr().out
    assert content(data_folder / "insects") == before


def test_checksums_are_of_the_files(tree, data_folder):
    prepare.prepare("insects", tree, 12)
    folder = data_folder / "insects"
    printed = subprocess.run(["sha256sum", *prepared.FILES], cwd=folder, capture_output=True, text=True).stdout
    found = prepared.describe(folder)["files"]
    assert {line.split()[1]: line.split()[0] for line in printed.splitlines()} == found
    whole = subprocess.run(["sha256sum"], input=printed, capture_output=True, text=True).stdout.split()[0]
    assert data.load("insects").checksum == whole


IDS = [f"n{1440764 + 17 * i:08d}" for i in range(103)]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """103 classes of one small image each in train/ and in val/, and folders that are none of ImageNet's."""
    root = tmp_path_factory.mktemp("imagenet")
    for i, name in enumerate(IDS):
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (3, 3), (i, 0, split == "val")).save(root / split / name / f"{name}_1.JPEG", "PNG")
    (root / "train" / "abacus").mkdir()
    (root / "val" / "abacus").mkdir()
    return root


def first_pixels(images):
    return images[:, :, 0, 0].tolist()


def test_imagenet100_is_the_first_hundred_ids(imagenet, data_folder, capsys):
    assert main(["data", "imagenet100", "--from", str(imagenet)]) == 0
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith("silalib: warning: ImageNet-100 has 129,395 training and 5,000 test images")
    assert "here are 100 and 100" in said.err
    whole = data.load("imagenet100")
    assert whole.train_images.shape == (100, 3, 224, 224)
    assert first_pixels(whole.train_images) == [[i, 0, 0] for i in range(100)]
    assert first_pixels(whole.test_images) == [[i, 0, 1] for i in range(100)]
    assert whole.train_labels.tolist() == whole.test_labels.tolist() == list(range(100))
    described = prepared.describe(data_folder / "imagenet100")
    assert described["classes"] == IDS[:100]
    assert described["plan"]["square"] == 256


def test_the_right_counts_give_no_warning(imagenet, data_folder, capsys):
    with mock.patch.dict(data.DATASETS, imagenet100=replace(data.DATASETS["imagenet100"], train=100, test=100)):
        assert main(["data", "imagenet100", "--from", str(imagenet)]) == 0
    assert capsys.readouterr().err == ""


def flatten(imagenet, root, wrong=None):
    """A copy of the tree with a flat val/, its images in another order; returns the id of each, in that order."""
    shutil.copytree(imagenet / "train", root / "train")
    (root / "val").mkdir()
    order = np.random.default_rng(0).permutation(len(IDS))
    for number, i in enumerate(order, 1):
        source = imagenet / "val" / IDS[i] / f"{IDS[i]}_1.JPEG"
        shutil.copy(source, root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    return [IDS[i] for i in order]


def write_devkit(root, truth):
    """meta.mat with numbers that are not in the order of the ids, and a synset with children as the devkit has."""
    from scipy.io import savemat

    folder = root / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    numbers = {name: 1 + (7 * i) % 103 for i, name in enumerate(IDS)}
    rows = [(n, name, "words", "gloss", 0.0) for name, n in numbers.items()] + [(1001, "n00001740", "w", "g", 9.0)]
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=kinds)[:, None]})
    text = "".join(f"{numbers[name]}\n" for name in truth)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(text)


def write_kaggle(root, truth):
    """The table that Kaggle ships, in no order, with boxes; three folders above its train/ and val/."""
    rows = [f"ILSVRC2012_val_{i:08d},{name} 10 20 30 40 {name} 1 2 3 4 " for i, name in enumerate(truth, 1)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *sorted(rows, reverse=True)]))


@pytest.mark.parametrize("kind", ["devkit", "kaggle"])
def test_a_flat_val_with_its_ground_truth(kind, imagenet, tmp_path, data_folder):
    root = tmp_path / "flat" / "ILSVRC" / "Data" / "CLS-LOC"
    truth = flatten(imagenet, root)
    (write_devkit if kind == "devkit" else write_kaggle)(root if kind == "devkit" else tmp_path / "flat", truth)
    prepare.prepare("imagenet100", root)
    whole = data.load("imagenet100")
    assert whole.test_labels.tolist() == list(range(100))
    assert first_pixels(whole.test_images) == [[i, 0, 1] for i in range(100)]


def byte_order_mark(path):
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))


def in_line(number, text):
    def change(path):
        lines = path.read_bytes().splitlines()
        lines[number - 1] = text
        path.write_bytes(b"\n".join(lines))

    change.line = number
    return change


@pytest.mark.parametrize("kind, change", [
    *((kind, byte_order_mark) for kind in ("devkit", "kaggle")),
    ("kaggle", in_line(1, b"image,label")), ("kaggle", in_line(7, b"no comma")), ("kaggle", in_line(7, b"\xff,\x00")),
    ("kaggle", in_line(9, b"ILSVRC2012_val_00000009,")), ("devkit", in_line(3, b"x")), ("devkit", in_line(5, b"2000")),
])  # fmt: skip
def test_a_fault_in_the_ground_truth_names_file_and_line(kind, change, imagenet, tmp_path):
    truth = flatten(imagenet, tmp_path / "flat")
    (write_devkit if kind == "devkit" else write_kaggle)(tmp_path / "flat", truth)
    name = "LOC_val_solution.csv" if kind == "kaggle" else "ILSVRC2012_validation_ground_truth.txt"
    (path,) = (tmp_path / "flat").rglob(name)
    change(path)
    if change is byte_order_mark:
        assert list(prepare.ground_truth(tmp_path / "flat" / "val").values()).count(truth[0]) == 1
    else:
        with pytest.raises(UserError, match=f"{name}, line {change.line}: .* is not of ImageNet's ground truth"):
            prepare.ground_truth(tmp_path / "flat" / "val")


def test_a_damaged_table_of_ids_is_named(imagenet, tmp_path):
    write_devkit(tmp_path, flatten(imagenet, tmp_path / "flat"))
    (path,) = tmp_path.rglob("meta.mat")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"meta\.mat is damaged"):
        prepare.ground_truth(tmp_path / "flat" / "val")


# -- interruptions

HALF_WAY = """
import itertools, os, signal, sys, time
from functools import partial
from silalib.__main__ import main
from silalib.launch import prepare

decode, calls = prepare.decode, itertools.count(1)

def stopping(*arguments):
    time.sleep(0.02)  # so that a signal is heard before all is done
    if next(calls) == 32:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    return decode(*arguments)

prepare.decode, prepare.prepare = stopping, partial(prepare.prepare, chunk=5)
sys.exit(main(["data", "folder", "--from", sys.argv[2], "--name", "insects", "--size", "12", "--workers", "2"]))
"""


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """(a tree of 90 images, everything that an uninterrupted call makes of it)."""
    root = tmp_path_factory.mktemp("larger")
    tree = make_tree(root / "tree", train=20, val=10)
    with mock.patch.dict(os.environ, SILALIB_DATA=str(root)):
        prepare.prepare("insects", tree, 12)
    return tree, content(root / "insects")


def sources(tree, shard, chunk=5):
    """The image files that are in a shard."""
    split, number = re.fullmatch(r"(train|test)-(\d+)\.raw", shard.name).groups()
    return [tree / path for path, _ in list_images(tree)[1][split][int(number) * chunk :][:chunk]]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_an_interrupted_call_resumes_and_ends_with_the_same_bytes(name, larger, data_folder, tmp_path):
    tree, whole = larger
    tree = shutil.copytree(tree, tmp_path / "tree")
    command = [sys.executable, "-c", HALF_WAY, name, str(tree)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    folder = data_folder / "insects"
    shards = list(folder.glob("shards/t*.raw"))
    assert not (folder / "dataset.json").exists()
    assert 4 <= len(shards) < 18
    if name == "SIGKILL":
        assert done.returncode == -signal.SIGKILL
    else:
        assert done.returncode == 75
        left = 90 - 5 * len(shards)
        assert done.stderr.splitlines()[-1] == f"silalib: stopped with {left} of 90 images left; start again to go on"
        assert "Traceback" not in done.stderr
    for path in [path for shard in shards for path in sources(tree, shard)]:
        path.write_bytes(b"")  # what is decoded is not read again
    prepare.prepare("insects", tree, 12, chunk=5)
    assert content(folder) == whole


class Killed(BaseException):
    pass


@pytest.fixture
def killed_at():
    """killed_at(n, function): call it, and end it at the n-th change to the disk. Returns whether there are as many."""

    def call(n, function):
        left = n

        def counted(change):
            def change_or_die(*arguments, **more):
                nonlocal left
                left -= 1
                if left <= 0:
                    raise Killed
                return change(*arguments, **more)

            return change_or_die

        changes = {name: counted(getattr(os, name)) for name in ("fsync", "replace", "unlink", "rmdir")}
        with mock.patch.multiple(os, **changes), suppress(Killed):
            function()
        return left <= 0

    return call


@pytest.mark.slow
def test_killed_at_every_change_to_the_disk_the_next_start_ends_with_the_same_bytes(
    tree, data_folder, killed_at, capsys
):
    break_some(tree)
    make = lambda: prepare.prepare("insects", tree, 12, skip_broken=True, workers=1, chunk=5)
    make()
    folder, n = data_folder / "insects", 1
    whole = content(folder)
    assert "shards" not in os.listdir(folder)
    shutil.rmtree(folder)
    while killed_at(n, make):
        make()
        assert content(folder) == whole, n
        shutil.rmtree(folder)
        n += 1
    assert n > 40


@pytest.mark.parametrize("limit", [1000, 10_000])
def test_a_full_disk_is_one_line_and_nothing_is_lost(limit, larger, data_folder):
    """No file may be larger: first the shards of 2 kB do not fit, then the array of 26 kB."""
    tree, whole = larger
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=r"^cannot write .*start again to go on[^\n]*$"):
            prepare.prepare("insects", tree, 12, chunk=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(list(data_folder.glob("insects/shards/t*.raw"))) == (0 if limit == 1000 else 18)
    prepare.prepare("insects", tree, 12, chunk=5)
    assert content(data_folder / "insects") == whole


def test_a_damaged_shard_is_decoded_again(larger, data_folder, capsys):
    tree, whole = larger
    broken = tree / "train" / "cat" / "7.jpg"
    good = broken.read_bytes()
    broken.write_bytes(b"")
    with pytest.raises(UserError, match="1 of 90 images are broken"):
        prepare.prepare("insects", tree, 12, chunk=5)
    broken.write_bytes(good)
    shards = sorted(data_folder.glob("insects/shards/t*.raw"))
    assert len(shards) == 18
    for shard, damage in zip(shards, (b"", shards[1].read_bytes()[:-1], b"not an array")):
        shard.write_bytes(damage)
    decoded = data_folder / "insects" / "shards" / "skipped.json"
    files.write_sealed(decoded, [])  # as if they were damaged only after all was decoded
    with pytest.raises(CorruptFile, match=rf"\.raw is damaged: delete {data_folder / 'insects'} to start anew"):
        prepare.prepare("insects", tree, 12, chunk=5)
    decoded.unlink()
    prepare.prepare("insects", tree, 12, chunk=5)
    assert content(data_folder / "insects") == whole


def break_some(tree):
    """Three images that cannot be decoded, one of them the last; returns their paths in order."""
    cut = tree / "train" / "ant" / "1.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    (tree / "train" / "bee" / "0.jpg").write_bytes(b"")
    (tree / "train" / "cat" / "3.jpg").write_text("<html>not found</html>")
    return ["train/ant/1.jpg", "train/bee/0.jpg", "train/cat/3.jpg"]


SKIPPING = ["data", "folder", "--name", "insects", "--size", "12", "--skip-broken", "--from"]


def test_broken_images_are_named_and_left_out_only_when_asked(tree, data_folder, capsys):
    intact = {p: expected_pixels(tree / p, 12) for p, _ in list_images(tree)[1]["train"]}
    broken = break_some(tree)
    arguments = [a for a in SKIPPING if a != "--skip-broken"]
    for _ in range(2):
        assert main([*arguments, str(tree)]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(": ")[:2] for line in lines[:3]] == [["broken", str(tree / path)] for path in broken]
        assert len(lines) == 4
        assert lines[3].startswith("silalib: error: 3 of 18 images are broken")
        assert "--skip-broken" in lines[3]
    assert main([*SKIPPING, str(tree)]) == 0
    said = capsys.readouterr()
    assert all(str(tree / path) in said.err for path in broken)
    assert "insects: 9 training and 6 test images" in said.out
    whole = data.load("insects")
    assert prepared.describe(data_folder / "insects")["skipped"] == broken
    assert len(whole.train_labels) == 9
    # each image that is left is there once, with its own label
    found = {}
    for pixels, label in zip(whole.train_images.permute(0, 2, 3, 1).numpy(), whole.train_labels.tolist()):
        (path,) = [p for p, same in intact.items() if np.array_equal(same, pixels)]
        found[path] = label
    label_of = {"ant": 0, "bee": 1, "cat": 2}
    assert found == {p: label_of[p.split("/")[1]] for p in intact if p not in broken}


def test_a_mended_image_is_taken(tree, data_folder, capsys):
    prepare.prepare("whole", tree, 12)
    path = tree / "train" / "bee" / "2.jpg"
    good = path.read_bytes()
    path.write_bytes(good[:100])
    with pytest.raises(UserError, match="1 of 18 images are broken"):
        prepare.prepare("mended", tree, 12)
    path.write_bytes(good)
    prepare.prepare("mended", tree, 12)
    assert data.load("mended").checksum == data.load("whole").checksum


# -- mistakes


def remove(path):
    return lambda tree: shutil.rmtree(tree / path)


def empty_class(tree):
    (tree / "train" / "dog").mkdir()


def only_in_val(tree):
    (tree / "val" / "eel").mkdir()


def flat_val(tree):
    shutil.rmtree(tree / "val")
    (tree / "val").mkdir()
    picture(0).save(tree / "val" / "ILSVRC2012_val_00000001.JPEG")


def no_classes(tree):
    shutil.rmtree(tree / "train")
    (tree / "train").mkdir()


@pytest.mark.parametrize(
    "damage, message",
    [
        (remove("."), "is not a folder: give the one that holds train/ and val/"),
        (remove("train"), "train is not a folder: give the one that holds train/ and val/"),
        (remove("val"), "val is not a folder: give the one that holds train/ and val/"),
        (no_classes, "has no folders: it needs one for each class"),
        (empty_class, "class dog has no images in"),
        (remove("val/bee"), "class bee has no images in"),
        (only_in_val, "is of a class that"),
        (flat_val, "put ILSVRC2012_devkit_t12/ (unpacked) or LOC_val_solution.csv into"),
    ],
)
def test_a_tree_of_another_form_is_one_line_and_1(damage, message, tree, data_folder, capsys):
    damage(tree)
    assert main(["data", "folder", "--from", str(tree), "--name", "insects", "--size", "12"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (data_folder / "insects").exists()


def test_too_few_classes_for_imagenet100(tree, data_folder, capsys):
    (tree / "train" / "n01440764").mkdir()
    assert main(["data", "imagenet100", "--from", str(tree)]) == 1
    error = capsys.readouterr().err
    assert "has 1 class folders such as n01440764: 100 are needed" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["digits", "MNIST", "cifar100", "cifar-10-batches-py", "ImageNet100", "folder"])
def test_a_built_in_name_is_not_given_away(name, tree, data_folder):
    with pytest.raises(UserError, match="built-in data set") as caught:
        prepare.prepare(name, tree, 12)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "two words"])
def test_a_name_must_do_as_a_folder_and_in_a_key(name, tree, data_folder):
    with pytest.raises(UserError, match="is no name for a data set"):
        prepare.prepare(name, tree, 12)


def test_too_little_disk_space(tree, data_folder):
    with pytest.raises(UserError, match=r"insects needs 90000\.0 GB, .* make room, or set SILALIB_DATA"):
        prepare.prepare("insects", tree, 10**6)
    assert not list(data_folder.glob("insects/shards/t*.raw"))


def test_a_data_folder_that_cannot_be_written(tree, data_folder, capsys):
    data_folder.write_text("not a folder")
    assert main(["data", "folder", "--from", str(tree), "--name", "insects", "--size", "12"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("silalib: error: cannot write to") and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["folder"],
        ["folder", "--from", ".", "--name", "x"],
        ["folder", "--from", ".", "--size", "8"],
        ["folder", "--name", "x", "--size", "8"],
        ["imagenet100", "--from", ".", "--size", "64"],
        ["cifar10", "--from", "."],
        ["folder", "--from", ".", "--name", "x", "--size", "0"],
    ],
)
def test_wrong_usage_is_2(arguments):
    with pytest.raises(SystemExit) as caught:
        main(["data", *arguments])
    assert caught.value.code == 2


def test_another_tree_or_size_does_not_mix(tree, data_folder, capsys):
    path = tree / "train" / "ant" / "0.jpg"
    good = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(UserError, match="1 of 18 images are broken"):
        prepare.prepare("insects", tree, 12)
    path.write_bytes(good)
    with pytest.raises(UserError, match="half prepared from other files or at another size"):
        prepare.prepare("insects", tree, 13)
    prepare.prepare("insects", tree, 12)
    with pytest.raises(UserError, match="prepared from other files or at another size"):
        prepare.prepare("insects", tree, 13)
    picture(77).save(tree / "train" / "ant" / "9.jpg")
    with pytest.raises(UserError, match="prepared from other files or at another size"):
        prepare.prepare("insects", tree, 12)


def test_two_processes_do_not_prepare_the_same(tree, data_folder):
    from filelock import FileLock

    (data_folder / "insects").mkdir(parents=True)
    with FileLock(data_folder / "insects" / ".lock"):
        with pytest.raises(UserError, match="another process is preparing"):
            prepare.prepare("insects", tree, 12)


def test_damage_is_found(tree, data_folder, capsys):
    prepare.prepare("insects", tree, 12)
    path = data_folder / "insects" / "train.npy"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert main(["data", "insects"]) == 1
    assert f"{path} is damaged: prepare it again" in capsys.readouterr().err
    path.write_bytes(good[:-1])
    data.load.cache_clear()
    with pytest.raises(UserError, match="is damaged: prepare it again"):
        data.load("insects")
    (data_folder / "insects" / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match=r"dataset\.json is damaged"):
        data.dataset("insects")
    capsys.readouterr()
    prepare.prepare("insects", tree, 12)
    assert "dataset.json was damaged and is now dataset.json.corrupt: all is decoded again" in capsys.readouterr().err
    assert path.read_bytes() == good
    (data_folder / "other" / "shards").mkdir(parents=True)
    files.write_sealed(data_folder / "other" / "shards" / "plan.json", {})
    (data_folder / "other" / "shards" / "plan.json").write_text("what?\n")
    with pytest.raises(CorruptFile, match=r"is damaged: delete .* to start anew"):
        prepare.prepare("other", tree, 12)


def other_contents(content):
    """Flipped bits, some bytes overwritten, cut off, empty, or longer."""
    middle = len(content) // 2
    for at in (0, middle, len(content) - 1):
        yield content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
    yield content[:middle] + b"0123456789abcdef" + content[middle + 16 :]
    yield from (content[:middle], content[:-1], b"", content + b"\0")


def test_corruption_is_found_in_every_file(tree, data_folder):
    prepare.prepare("insects", tree, 12)
    for name in (*prepared.FILES, "dataset.json", "dataset.sha256"):
        path = data_folder / "insects" / name
        good = path.read_bytes()
        for bad in other_contents(good):
            path.write_bytes(bad)
            data.load.cache_clear()
            with pytest.raises(CorruptFile) as caught:
                data.load("insects")
            assert "\n" not in str(caught.value)
        path.write_bytes(good)
    data.load("insects")


def test_labels_out_of_range_are_refused(tree, data_folder):
    prepare.prepare("insects", tree, 12)
    folder = data_folder / "insects"
    path = folder / "train_labels.npy"
    for wrong in (-1, 3):
        labels = np.load(path)
        labels[0] = wrong
        np.save(path, labels)
        description = json.loads((folder / "dataset.json").read_bytes())
        description["files"]["train_labels.npy"] = files.sha256(path.read_bytes())
        files.write_sealed(folder / "dataset.json", description)
        data.load.cache_clear()
        with pytest.raises(UserError, match="has labels outside of 0 to 2: prepare it again"):
            data.load("insects")


def test_what_is_not_prepared(data_folder, results, capsys):
    run = Run("imagenet100", ("convnet12",), "ind", width=0.0625, epochs=1)
    with pytest.raises(MissingData, match=r"python -m silalib data imagenet100 --from DIR"):
        data.load("imagenet100")
    assert ensure([run]) == {}
    assert "1 of 1 runs not run" in (error := capsys.readouterr().err) and "data imagenet100 --from DIR" in error
    with pytest.raises(UserError, match=r"unknown data set 'insects': choose from digits, .*, imagenet100$"):
        Run("insects")


# -- training


def train(run, folder, **more):
    return records.write_record(run, folder, *trainer.train(run, folder, "cpu", **more))


@pytest.fixture
def leaves(tmp_path, data_folder):
    """A prepared folder of 60 training and 30 test images in three classes."""
    prepare.prepare("leaves", make_tree(tmp_path / "leaves", train=20, val=10), 16)


def test_a_run_on_a_prepared_folder(leaves, results, capsys):
    run = Run(
        "leaves", ("convnet12",) * 2, "sila", width=0.125, epochs=2, batch_size=20, milestones=(), augment="crop+flip",
        noise_images=12, noise_sigmas=1, noise_draws=1,
    )  # fmt: skip
    record = ensure([run], workers=1, device="cpu")[run]
    assert run.key.startswith("leaves-convnet12+convnet12-sila-s0-")
    assert record.result["provenance"]["data_sha256"] == data.load("leaves").checksum
    assert record.result["provenance"]["train_images"] == 60
    assert record.test["labels"].tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert len(record.history) == 4
    assert tables.title("paper", "leaves") == "leaves, profile paper"
    with torch.device("meta"):
        macs = 2 * count_macs(MODELS["convnet12"](3, 3, 0.125), (3, 16, 16))
    assert estimate.cost(run) == 2 * macs * (3 * 60 + 30)


def test_a_mapped_file_is_read_where_it_lies(leaves, tiny):
    parts, checksum = data.splits(tiny(dataset="leaves", train_size=32, holdout=10), CPU)
    whole = data.load("leaves")
    assert whole.mapped and checksum == whole.checksum
    for name, images in (("train", whole.train_images), ("holdout", whole.train_images), ("test", whole.test_images)):
        assert isinstance(parts[name].images, MemoryMapped)
        assert parts[name].images.images.data_ptr() == images.data_ptr()
    assert [len(parts[name]) for name in ("train", "holdout", "test")] == [32, 10, 30]
    order = data.balanced_order(whole.train_labels)
    chosen = order[10:42].sort().values
    assert torch.equal(parts["train"].labels, whole.train_labels[chosen])
    assert torch.equal(parts["train"].images[:], whole.train_images[chosen].permute(0, 2, 3, 1))


def test_memory_mapped_training_is_resident_training(leaves, tiny, tmp_path, comparable):
    """To the last bit, with every final evaluation, and when it is stopped within an epoch and resumed."""
    run = tiny(
        dataset="leaves", train_size=None, batch_size=25, augment="crop+flip",  # two batches and a rest
        noise_images=20, noise_sigmas=2, noise_draws=2, hessian_images=10,
    )  # fmt: skip
    whole = data.load("leaves")
    arrays = whole.train_images, whole.train_labels, whole.test_images, whole.test_labels
    in_memory = data.DatasetSpec("leaves", 3, (3, 16, 16), 60, 30, read=lambda: [part.clone() for part in arrays])
    data.load.cache_clear()
    with mock.patch.dict(data.DATASETS, leaves=in_memory):
        assert isinstance(data.splits(run, CPU)[0]["train"].images, torch.Tensor)
        resident = comparable(train(run, tmp_path / "resident"))
    data.load.cache_clear()
    assert isinstance(data.splits(run, CPU)[0]["train"].images, MemoryMapped)
    assert comparable(train(run, tmp_path / "mapped")) == resident
    for step in (1, 3):  # both within an epoch of two steps; the second goes on from the first
        asked = iter([None, "enough"] if step == 3 else ["enough"])
        with pytest.raises(Stopped, match=f"step {step} of 4"):
            train(run, tmp_path / "resumed", stop=asked.__next__)
    assert comparable(train(run, tmp_path / "resumed")) == resident


@pytest.mark.parametrize("augment", ["none", "crop", "flip", "crop+flip"])
def test_memory_mapped_batches_are_resident_batches(augment, tiny):
    images = torch.randint(256, (50, 9, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(45, 4, -1)
    mapped = MemoryMapped(images, rows, CPU)
    plan = epoch_plan(tiny(augment=augment), 0, len(rows), CPU)
    sources = mapped, mapped.resident()
    batches = [[images for images, *_ in TrainingBatches(source, augment)(plan, 16)] for source in sources]
    assert [len(batch) for batch in batches[0]] == [16, 16, 9]
    assert all(map(torch.equal, *batches))


def test_batches_come_in_order():
    images = torch.arange(50, dtype=torch.uint8).reshape(50, 1, 1, 1)
    rows = torch.arange(49, 9, -1)  # row i is image 49 - i
    mapped = MemoryMapped(images, rows, CPU)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    batches = list(mapped.batches(order, 7))
    assert [len(batch) for batch in batches] == [7, 7, 7, 7, 7, 5]
    assert torch.cat(batches).flatten().tolist() == [49 - i for i in order.tolist()]
    assert mapped.shape == (40, 1, 1, 1) and len(mapped) == 40
    assert mapped[2:4].flatten().tolist() == [47, 46]
    assert mapped[torch.tensor([5, 0])].flatten().tolist() == [44, 49]
    assert torch.equal(mapped.resident(), images[rows])
    for source in (mapped, images[rows]):
        assert torch.cat(list(in_batches(source, 4, last=10))).flatten().tolist() == list(range(49, 39, -1))
        assert torch.cat(list(in_batches(source, 4))).flatten().tolist() == list(range(49, 9, -1))


def test_what_fits_on_a_gpu():
    """Two images of 300 bytes each: with room for 600 bytes, or 1,200 with a padded copy, at 0.3 of what is free."""
    pixels = torch.zeros(2, 3, 10, 10, dtype=torch.uint8)
    labels = torch.zeros(2).long()
    whole = data.Images(pixels, labels, pixels[:0], labels[:0], "checksum", mapped=True)
    gpu = torch.device("cuda")
    assert data.fits_on_device(whole, "flip", gpu, free=2100)
    assert not data.fits_on_device(whole, "crop+flip", gpu, free=2100)
    assert not data.fits_on_device(whole, "flip", gpu, free=1900)
    assert data.fits_on_device(whole, "crop", gpu, free=4100)
    assert not data.fits_on_device(whole, "flip", CPU)
    in_memory = data.Images(pixels, labels, pixels[:0], labels[:0], "checksum")
    assert data.fits_on_device(in_memory, "flip", CPU) and data.fits_on_device(in_memory, "flip", gpu)


@pytest.mark.parametrize(
    "size, batch, expected", [(16, 64, 125), (128, 32, 125), (224, 100, 100), (224, 8, 40), (224, 600, 125)]
)
def test_the_evaluation_batch_shrinks_with_large_images(size, batch, expected, tree, data_folder, tiny):
    """On a CPU 125 images, of large ones as many as have 500 x 64 x 64 pixels, but never below a training batch."""
    prepare.prepare("insects", tree, size)
    run = tiny(dataset="insects", batch_size=batch, train_size=None)
    assert trainer.Material(run, CPU).eval_batch == expected


@pytest.mark.parametrize("limit", [1, 5000])
def test_normalisation_in_parts_is_the_same(limit, leaves, tiny):
    pixels = data.load("leaves").train_images.permute(0, 2, 3, 1)
    whole = data.normalisation(data.Split(pixels.clone(), None))
    split = data.splits(tiny(dataset="leaves", train_size=None), CPU)[0]["train"]
    with mock.patch.object(data, "AT_ONCE", limit):
        for source in (split, data.Split(pixels.clone(), None)):
            assert all(map(torch.equal, data.normalisation(source), whole))
    levels = pixels.double().flatten(0, 2) / 255
    torch.testing.assert_close(whole[0].double(), levels.mean(0), rtol=1e-6, atol=0)
