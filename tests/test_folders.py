"""Folders of images as data sets: what is decoded, interruptions, mistakes, and training on what stays on disk."""

import io
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from silalib import data, experiments, folders, launch, trainer
from silalib.__main__ import main
from silalib.errors import MissingData, Stopped, UserError
from silalib.models import MODELS, count_macs
from silalib.paths import ROOT
from silalib.runs import Run, ensure
from silalib.stream import Streamed, in_batches

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


def one_by_one(jobs, workers, done):
    """Decode without starting processes."""
    for key, job in list(jobs.items()):
        done(key, folders.decode_rows(*job))


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(folders, "decode_all", one_by_one)


def content(folder):
    """The bytes of everything that a complete folder holds."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def expected_pixels(path, size):
    """What torchvision's usual evaluation transforms make of an image file."""
    from silalib._torchvision import torchvision

    t = torchvision.transforms
    return np.asarray(t.CenterCrop(size)(t.Resize(size)(Image.open(path).convert("RGB"))))


# -- pixels


@pytest.mark.parametrize("shape", [(500, 375), (333, 500), (224, 224), (100, 90), (256, 1000), (640, 97)])
def test_the_shorter_side_is_resized_and_the_centre_cut_out(shape, tmp_path):
    path = tmp_path / "picture.png"
    picture(0, *shape).save(path)
    assert np.array_equal(folders.decode(path, 224), expected_pixels(path, 224))


@pytest.mark.parametrize("shape", [(500, 375), (333, 500), (256, 256), (100, 90)])
def test_imagenet_is_resized_to_a_square_and_the_centre_cut_out(shape, tmp_path):
    from silalib._torchvision import torchvision

    path = tmp_path / "picture.png"
    picture(0, *shape).save(path)
    t = torchvision.transforms
    ours = folders.decode(path, 224, square=256)
    assert np.array_equal(ours, t.CenterCrop(224)(t.Resize((256, 256))(Image.open(path))))
    # and in floating point, without Pillow
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float()
    square = torch.nn.functional.interpolate(pixels, (256, 256), mode="bilinear", antialias=True)
    near = square[0, :, 16:240, 16:240].permute(1, 2, 0)
    np.testing.assert_allclose(ours, near, rtol=0, atol=1.01)


def test_an_image_of_the_size_is_not_touched(tmp_path):
    picture(3, 24, 24).save(tmp_path / "a.png")
    assert np.array_equal(folders.decode(tmp_path / "a.png", 24), picture(3, 24, 24))


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
    pixels = folders.decode(file, 8)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.astype(int), np.broadcast_to(rgb, (8, 8, 3)), rtol=0, atol=2)


def test_a_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([1, 2, 3, 200, 100, 50])
    image.save(tmp_path / "a.png", transparency=1)
    assert (folders.decode(tmp_path / "a.png", 8) == (200, 100, 50)).all()


# -- trees


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
    assert folders.describe(data_folder / "insects")["classes"] == ["ant", "bee", "cat"]
    assert set(content(data_folder / "insects")) == {*folders.FILES, "dataset.json", "dataset.sha256"}
    # again: nothing is written, all is verified
    before = content(data_folder / "insects")
    for again in (arguments, ["data", "insects"]):
        assert main(again) == 0
        assert "13 training and 6 test images" in capsys.readouterr().out
    assert content(data_folder / "insects") == before


def test_checksums_are_of_the_files(tree, data_folder, in_this_process):
    data.prepare("insects", tree, 12)
    folder = data_folder / "insects"
    printed = subprocess.run(["sha256sum", *folders.FILES], cwd=folder, capture_output=True, text=True).stdout
    found = folders.describe(folder)["files"]
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


def test_imagenet100_is_the_first_hundred_ids(imagenet, data_folder, in_this_process, capsys):
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
    described = folders.describe(data_folder / "imagenet100")
    assert described["classes"] == IDS[:100]
    assert described["plan"]["square"] == 256


def test_the_right_counts_give_no_warning(imagenet, data_folder, in_this_process, monkeypatch, capsys):
    from dataclasses import replace

    monkeypatch.setitem(data.DATASETS, "imagenet100", replace(data.DATASETS["imagenet100"], train=100, test=100))
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
def test_a_flat_val_with_its_ground_truth(kind, imagenet, tmp_path, data_folder, in_this_process):
    root = tmp_path / "flat" / "ILSVRC" / "Data" / "CLS-LOC"
    truth = flatten(imagenet, root)
    (write_devkit if kind == "devkit" else write_kaggle)(root if kind == "devkit" else tmp_path / "flat", truth)
    data.prepare("imagenet100", root)
    whole = data.load("imagenet100")
    assert whole.test_labels.tolist() == list(range(100))
    assert first_pixels(whole.test_images) == [[i, 0, 1] for i in range(100)]


# -- interruptions

HALF_WAY = """
import os, signal, sys, time
from silalib import folders
from silalib.__main__ import main

folders.CHUNK = 5
decode, note = folders.decode, folders.note
# in the processes that decode, too: they cannot be done before the signal is heard
folders.decode = lambda *arguments: time.sleep(0.03) or decode(*arguments)

def note_and_stop(journal, entry):
    note(journal, entry)
    note_and_stop.left -= 1
    if note_and_stop.left == 0:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))

note_and_stop.left = 5
if __name__ == "__main__":
    folders.note = note_and_stop
    sys.exit(main(["data", "folder", "--from", sys.argv[2], "--name", "insects", "--size", "12", "--workers", "2"]))
"""


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """(a tree of 90 images, everything that an uninterrupted call makes of it)."""
    root = tmp_path_factory.mktemp("larger")
    tree = make_tree(root / "tree", train=20, val=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "decode_all", one_by_one)
        folders.prepare(tree, root / "whole", "insects", 12)
    return tree, content(root / "whole")


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_an_interrupted_call_goes_on_and_ends_with_the_same_bytes(name, larger, data_folder, tmp_path):
    tree, whole = larger
    script = tmp_path / "half_way.py"
    script.write_text(HALF_WAY)
    command = [sys.executable, str(script), name, str(tree)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # it returns when no process holds the pipes any longer: those that decode end with the one that started them
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    journal = data_folder / "insects" / "journal.jsonl"
    noted = journal.read_text().splitlines()
    assert not (data_folder / "insects" / "dataset.json").exists()
    if name == "SIGKILL":
        assert done.returncode == -signal.SIGKILL
        assert len(noted) == 5
        with open(journal, "ab") as file:  # as if it was killed while it wrote
            file.write(b'{"split": "tr')
    else:
        assert done.returncode == 75
        assert 5 <= len(noted) < 19
        left = 90 - 5 * (len(noted) - 1)
        assert done.stderr.splitlines()[-1] == (f"silalib: stopped with {left} of 90 images left; start again to go on")
        assert "Traceback" not in done.stderr
    decoded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "CHUNK", 5)
        patch.setattr(folders, "decode_all", lambda jobs, *rest: decoded.extend(jobs) or one_by_one(jobs, *rest))
        data.prepare("insects", tree, 12)
    assert len(decoded) == 18 - (len(noted) - 1)  # only what was left
    assert content(data_folder / "insects") == whole


def test_a_line_that_was_not_written_to_its_end_is_cut_off(tmp_path):
    journal = tmp_path / "journal.jsonl"
    assert folders.read_journal(journal) == []
    folders.note(journal, {"split": "train", "start": 0})
    with open(journal, "ab") as file:
        file.write(b'{"split": "tr')
    assert folders.read_journal(journal) == [{"split": "train", "start": 0}]
    folders.note(journal, {"split": "train", "start": 128})
    assert folders.read_journal(journal) == [{"split": "train", "start": s} for s in (0, 128)]


def break_some(tree):
    """Three images that cannot be decoded, one of them the last; returns their paths in order."""
    cut = tree / "train" / "ant" / "1.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    (tree / "train" / "bee" / "0.jpg").write_bytes(b"")
    (tree / "train" / "cat" / "3.jpg").write_text("<html>not found</html>")
    return ["train/ant/1.jpg", "train/bee/0.jpg", "train/cat/3.jpg"]


SKIPPING = ["data", "folder", "--name", "insects", "--size", "12", "--skip-broken", "--from"]


def test_broken_images_are_named_and_left_out_only_when_asked(tree, data_folder, in_this_process, capsys):
    intact = {p: expected_pixels(tree / p, 12) for p in folders.list_tree(tree).paths["train"]}
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
    assert folders.describe(data_folder / "insects")["skipped"] == broken
    assert len(whole.train_labels) == 9
    # each image that is left is there once, with its own label
    found = {}
    for pixels, label in zip(whole.train_images.permute(0, 2, 3, 1).numpy(), whole.train_labels.tolist()):
        (path,) = [p for p, same in intact.items() if np.array_equal(same, pixels)]
        found[path] = label
    label_of = {"ant": 0, "bee": 1, "cat": 2}
    assert found == {p: label_of[p.split("/")[1]] for p in intact if p not in broken}


def test_a_mended_image_is_taken(tree, data_folder, in_this_process, capsys):
    data.prepare("whole", tree, 12)
    path = tree / "train" / "bee" / "2.jpg"
    good = path.read_bytes()
    path.write_bytes(good[:100])
    with pytest.raises(UserError, match="1 of 18 images are broken"):
        data.prepare("mended", tree, 12)
    path.write_bytes(good)
    data.prepare("mended", tree, 12)
    assert data.load("mended").checksum == data.load("whole").checksum


@pytest.mark.parametrize("where", ["header", "cut", "labels", "sums", "description"])
def test_leaving_out_broken_images_can_be_interrupted_anywhere(where, tree, data_folder, in_this_process, monkeypatch):
    from silalib import runs

    break_some(tree)
    data.prepare("whole", tree, 12, skip_broken=True)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        if where in ("header", "cut"):
            real = folders.set_rows

            def set_rows(path, n, size, mode="r+b"):
                if mode != "r+b":
                    return real(path, n, size, mode)
                if where == "cut":  # the header is written, the file not yet cut off
                    length = path.stat().st_size
                    real(path, n, size)
                    os.truncate(path, length)
                raise KeyboardInterrupt

            patch.setattr(folders, "set_rows", set_rows)
        elif where == "sums":
            patch.setattr(folders, "sums", interrupted)
        else:
            write = runs.write_atomically
            wanted = "test_labels.npy" if where == "labels" else "dataset.json"
            patch.setattr(
                runs,
                "write_atomically",
                lambda path, bytes: interrupted() if path.name == wanted else write(path, bytes),
            )
        with pytest.raises(KeyboardInterrupt):
            data.prepare("again", tree, 12, skip_broken=True)
    monkeypatch.setattr(folders, "decode_rows", interrupted)  # nothing is decoded again
    data.prepare("again", tree, 12)
    read = lambda name: {k: v for k, v in content(data_folder / name).items() if not k.startswith("dataset")}
    assert read("again") == read("whole")


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
        (remove("train"), "has no folder train/"),
        (remove("val"), "has no folder val/"),
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
        data.prepare(name, tree, 12)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "two words"])
def test_a_name_must_do_as_a_folder_and_in_a_key(name, tree, data_folder):
    with pytest.raises(UserError, match="is no name for a data set"):
        data.prepare(name, tree, 12)


def test_too_little_disk_space(tree, data_folder, monkeypatch, capsys):
    usage = SimpleNamespace(free=18 * 12 * 12 * 3 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(folders, "decode_all", None)
    with pytest.raises(UserError, match="make room, or set SILALIB_DATA"):
        data.prepare("insects", tree, 12)


def test_a_data_folder_that_cannot_be_written(tree, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SILALIB_DATA", str(tmp_path / "file"))
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


def test_another_tree_or_size_does_not_mix(tree, data_folder, in_this_process, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "decode_all", lambda *_: None)
        with pytest.raises(Stopped, match="stopped with 18 of 18 images left"):
            data.prepare("insects", tree, 12)
    with pytest.raises(UserError, match="half prepared from other files or at another size"):
        data.prepare("insects", tree, 13)
    data.prepare("insects", tree, 12)
    with pytest.raises(UserError, match="prepared from other files or at another size"):
        data.prepare("insects", tree, 13)
    picture(77).save(tree / "train" / "ant" / "9.jpg")
    with pytest.raises(UserError, match="prepared from other files or at another size"):
        data.prepare("insects", tree, 12)


def test_two_processes_do_not_prepare_the_same(tree, data_folder):
    from filelock import FileLock

    (data_folder / "insects").mkdir(parents=True)
    with FileLock(data_folder / "insects" / ".lock"):
        with pytest.raises(UserError, match="another process is preparing"):
            data.prepare("insects", tree, 12)


def test_damage_is_found(tree, data_folder, in_this_process, capsys):
    data.prepare("insects", tree, 12)
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
    (data_folder / "other").mkdir()
    (data_folder / "other" / "journal.jsonl").write_text("what?\n")
    with pytest.raises(UserError, match="is damaged: delete"):
        data.prepare("other", tree, 12)


def test_what_is_not_prepared(data_folder, results, capsys):
    run = Run("imagenet100", ("convnet12",), "ind", width=0.0625, epochs=1)
    with pytest.raises(MissingData, match=r"python -m silalib data imagenet100 --from DIR"):
        data.load("imagenet100")
    assert ensure([run]) == {}
    assert "1 of 1 runs not run" in (error := capsys.readouterr().err) and "data imagenet100 --from DIR" in error
    with pytest.raises(UserError, match=r"unknown data set 'insects': choose from digits, .*, imagenet100$"):
        Run("insects")


# -- training


@pytest.fixture
def leaves(tmp_path, data_folder, in_this_process):
    """A prepared folder of 60 training and 30 test images in three classes."""
    data.prepare("leaves", make_tree(tmp_path / "leaves", train=20, val=10), 16)


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
    assert experiments.title("paper", "leaves") == "leaves, profile paper"
    with torch.device("meta"):
        macs = 2 * count_macs(MODELS["convnet12"](3, 3, 0.125), (3, 16, 16))
    assert launch.cost(run) == 2 * macs * (3 * 60 + 30)


def test_a_mapped_file_is_read_where_it_lies(leaves, tiny):
    parts, checksum = data.splits(tiny(dataset="leaves", train_size=32, holdout=10), CPU)
    whole = data.load("leaves")
    assert whole.mapped and checksum == whole.checksum
    for name, images in (("train", whole.train_images), ("holdout", whole.train_images), ("test", whole.test_images)):
        assert isinstance(parts[name].images, Streamed)
        assert parts[name].images.images.data_ptr() == images.data_ptr()
    assert [len(parts[name]) for name in ("train", "holdout", "test")] == [32, 10, 30]
    order = data.balanced_order(whole.train_labels)
    chosen = order[10:42].sort().values
    assert torch.equal(parts["train"].labels, whole.train_labels[chosen])
    assert torch.equal(parts["train"].images[:], whole.train_images[chosen].permute(0, 2, 3, 1))


def test_streamed_training_is_resident_training(tiny, tmp_path, comparable, monkeypatch):
    """To the last bit, with every final evaluation, and when it is stopped within an epoch and resumed."""
    # 70 images are two batches of 32 and a rest
    run = tiny(
        train_size=70, augment="crop+flip", noise_images=20, noise_sigmas=2, noise_draws=2, hessian_images=10
    )  # fmt: skip
    resident = comparable(trainer.train(run, tmp_path / "resident", "cpu"))
    monkeypatch.setattr(data, "stays", lambda *_: False)
    assert comparable(trainer.train(run, tmp_path / "streamed", "cpu")) == resident
    for step in (1, 3):  # both within an epoch of two steps; the second goes on from the first
        asked = iter([None, "enough"] if step == 3 else ["enough"])
        with pytest.raises(Stopped, match=f"step {step} of 4"):
            trainer.train(run, tmp_path / "resumed", "cpu", stop=asked.__next__)
    assert comparable(trainer.train(run, tmp_path / "resumed", "cpu")) == resident


@pytest.mark.parametrize("augment", ["none", "crop", "crop+flip"])
def test_streamed_with_every_augmentation(augment, tiny, tmp_path, comparable, monkeypatch):
    run = tiny(augment=augment, epochs=1)
    resident = comparable(trainer.train(run, tmp_path / "resident", "cpu"))
    monkeypatch.setattr(data, "stays", lambda *_: False)
    assert comparable(trainer.train(run, tmp_path / "streamed", "cpu")) == resident


def test_batches_come_in_order():
    images = torch.arange(50, dtype=torch.uint8).reshape(50, 1, 1, 1)
    rows = torch.arange(49, 9, -1)  # row i is image 49 - i
    streamed = Streamed(images, rows, CPU)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    batches = list(streamed.batches(order, 7))
    assert [len(batch) for batch in batches] == [7, 7, 7, 7, 7, 5]
    assert torch.cat(batches).flatten().tolist() == [49 - i for i in order.tolist()]
    assert streamed.shape == (40, 1, 1, 1) and len(streamed) == 40
    assert streamed[2:4].flatten().tolist() == [47, 46]
    assert streamed[torch.tensor([5, 0])].flatten().tolist() == [44, 49]
    assert torch.equal(streamed.resident(), images[rows])
    for source in (streamed, images[rows]):
        assert torch.cat(list(in_batches(source, 4, last=10))).flatten().tolist() == list(range(49, 39, -1))
        assert torch.cat(list(in_batches(source, 4, 10, 13))).flatten().tolist() == [39, 38, 37]
        assert torch.cat(list(in_batches(source, 4))).flatten().tolist() == list(range(49, 9, -1))


def test_what_stays_on_a_gpu(monkeypatch):
    """Two images of 300 bytes each: with room for 600 bytes, or 1,200 with a padded copy, at 0.3 of what is free."""
    pixels = torch.zeros(2, 3, 10, 10, dtype=torch.uint8)
    labels = torch.zeros(2).long()
    whole = data.Images(pixels, labels, pixels[:0], labels[:0], "checksum", mapped=True)
    gpu = torch.device("cuda")
    free = lambda n: monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (n, 10**9))
    free(2100)
    assert data.stays(whole, "flip", gpu)
    assert not data.stays(whole, "crop+flip", gpu)
    free(1900)
    assert not data.stays(whole, "flip", gpu)
    free(4100)
    assert data.stays(whole, "crop", gpu)
    assert not data.stays(whole, "flip", CPU)
    in_memory = data.Images(pixels, labels, pixels[:0], labels[:0], "checksum")
    assert data.stays(in_memory, "flip", CPU) and data.stays(in_memory, "flip", gpu)


@pytest.mark.parametrize(
    "size, batch, on_cpu, on_gpu",
    [
        (28, 64, 125, 500), (32, 128, 125, 500), (64, 32, 125, 500), (128, 32, 125, 125), (224, 100, 100, 100),
        (224, 8, 40, 40), (224, 600, 125, 500),
    ],
)  # fmt: skip
def test_the_evaluation_batch_shrinks_with_large_images(size, batch, on_cpu, on_gpu, tiny):
    """On a GPU 500 images of 64x64 pixels, above as many pixels; never below a training batch, but for the most."""
    run, shape = tiny(batch_size=batch, train_size=None), (9, size, size, 3)
    assert trainer.evaluation_batch(run, shape, CPU) == on_cpu
    assert trainer.evaluation_batch(run, shape, torch.device("cuda")) == on_gpu


@pytest.mark.parametrize("limit", [1, 5000, 1 << 26])
def test_normalisation_in_parts_is_the_same(limit, leaves, monkeypatch, tiny):
    pixels = data.load("leaves").train_images.permute(0, 2, 3, 1)
    whole = data.normalisation(data.Split(pixels.clone(), None))
    monkeypatch.setattr(data, "HISTOGRAM_BYTES", limit)
    split = data.splits(tiny(dataset="leaves", train_size=None), CPU)[0]["train"]
    for source in (split, data.Split(pixels.clone(), None)):
        assert all(map(torch.equal, data.normalisation(source), whole))
    levels = pixels.double().flatten(0, 2) / 255
    torch.testing.assert_close(whole[0].double(), levels.mean(0), rtol=1e-6, atol=0)
