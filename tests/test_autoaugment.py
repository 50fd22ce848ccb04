"""AutoAugment against torchvision's own table and operations, image by image; its choices; training with it."""

import math
from collections import Counter

import pytest
import torch

from silalib import records
from silalib.data import autoaugment
from silalib.data.augment import epoch_plan
from silalib.data.autoaugment import OPERATIONS, POLICY, apply, draw
from silalib.errors import Stopped
from silalib.run import Run
from silalib.training import execution, trainer

CPU = torch.device("cpu")
GEOMETRY = ("ShearY", "TranslateX", "TranslateY", "Rotate")
BLENDS = ("Color", "Contrast", "Sharpness")


@pytest.fixture(scope="module")
def theirs():
    """torchvision's AutoAugment with the policy for CIFAR-10."""
    from silalib.data._torchvision import torchvision  # noqa: F401

    v2 = pytest.importorskip("torchvision.transforms.v2")
    return v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)


def by_torchvision(theirs, image, name, level, negative):
    """One operation of torchvision on one image (H, W, C), with the magnitude and sign that it would use itself."""
    magnitudes, signed = theirs._AUGMENTATION_SPACE[name]
    magnitudes = magnitudes(10, *image.shape[:2])
    magnitude = 0.0 if magnitudes is None else float(magnitudes[level])
    if signed and negative:
        magnitude = -magnitude
    moved = theirs._apply_image_or_video_transform(
        image.permute(2, 0, 1).contiguous(), name, magnitude, theirs.interpolation, theirs._fill
    )
    return moved.permute(1, 2, 0)


def made_up(height, width, channels):
    """Random, smooth, constant and nearly constant uint8 images (n, H, W, C)."""
    g = torch.Generator().manual_seed(0)
    shape = (height, width, channels)
    noise = torch.randint(256, (3, *shape), generator=g)
    y, x, c = torch.meshgrid(*(torch.linspace(0, 1, n) if n > 1 else torch.zeros(1) for n in shape), indexing="ij")
    smooth = [127 + 120 * torch.sin(4 * x + 3 * y + c), 40 + 100 * x * y + 30 * c, 255 * x, 90 + 20 * y - 10 * c]
    constant = [torch.full(shape, level) for level in (0, 1, 128, 254, 255)]
    by_channel = torch.tensor([7, 130, 250])[:channels].expand(shape)
    dot, two = torch.full(shape, 100), torch.full(shape, 3)
    dot[4, 5] = 101
    two[: height // 2] = 200
    narrow = 60 + noise[0] % 5
    dark = noise[1] * (noise[2] > 250)  # mostly one level: a small step when equalized
    images = [*noise, *smooth, *constant, by_channel, dot, two, narrow, dark]
    return torch.stack([image.round().to(torch.uint8) for image in images])


def agree(name, ours, expected):
    """Of one image (H, W, C): exactly for tables of levels, to one level for blends, in 99% of the pixels if moved."""
    apart = (ours.int() - expected.int()).abs()
    if name in GEOMETRY:
        return (apart.amax(-1) == 0).double().mean() >= 0.99
    return apart.max() <= (1 if name in BLENDS else 0)


def check(theirs, images, operation):
    name, level, negative = OPERATIONS[operation]
    ours = apply(images, torch.full((len(images),), operation))
    assert ours.dtype == torch.uint8 and ours.shape == images.shape
    for i, image in enumerate(images):
        assert agree(name, ours[i], by_torchvision(theirs, image, name, level, negative)), i


# -- the policy and its operations


def test_the_policy_is_torchvisions(theirs):
    assert list(POLICY) == theirs._policies


def test_the_operations_are_those_of_the_policy_with_torchvisions_signs(theirs):
    expected = {("Identity", None, False)}
    for sub_policy in theirs._policies:
        for name, _, level in sub_policy:
            expected.add((name, level, False))
            if theirs._AUGMENTATION_SPACE[name][1]:
                expected.add((name, level, True))
    assert set(OPERATIONS) == expected
    assert len(OPERATIONS) == len(expected)


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (24, 40, 3)], ids=str)
@pytest.mark.parametrize("operation", range(1, len(OPERATIONS)), ids=lambda i: "-".join(map(str, OPERATIONS[i])))
def test_an_operation_is_torchvisions(operation, shape, theirs):
    check(theirs, made_up(*shape), operation)


def test_operations_on_real_images_are_torchvisions(theirs, real_data):
    images = real_data("cifar10").train_images[:100].permute(0, 2, 3, 1)
    for operation in range(1, len(OPERATIONS)):
        check(theirs, images, operation)


def test_geometry_moves_what_it_should():
    """By hand: 14 pixels for 150/331 of 32 in the last bin; what comes in is black; the arguments are left alone."""
    image = (1 + torch.arange(32 * 32) % 255).to(torch.uint8).reshape(1, 32, 32, 1)
    before = image.clone()
    right = apply(image, torch.tensor([OPERATIONS.index(("TranslateX", 9, False))]))
    assert not right[:, :, :14].any()
    assert torch.equal(right[:, :, 14:], image[:, :, :-14])
    up = apply(image, torch.tensor([OPERATIONS.index(("TranslateY", 9, True))]))
    assert not up[:, -14:].any()
    assert torch.equal(up[:, :-14], image[:, 14:])
    assert torch.equal(image, before)


def test_colour_of_one_channel_is_the_identity():
    images = made_up(28, 28, 1)
    for operation, (name, _, _) in enumerate(OPERATIONS):
        if name in ("Color", "Identity"):
            assert torch.equal(apply(images, torch.full((len(images),), operation)), images)


# -- a batch


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_has_its_own_choices(channels, theirs):
    """All 25 sub-policies, applied or not, with both signs, in one batch: each operation on what the first one left."""
    cases = torch.cartesian_prod(torch.arange(25), *[torch.arange(2)] * 4)
    sub_policy, applied, negative = cases[:, 0], cases[:, 1:3].bool(), cases[:, 3:].bool()
    images = made_up(32, 32, channels)[[0, 3, 4, 6]].repeat(len(cases) // 4, 1, 1, 1)
    first_alone = applied & torch.tensor([True, False])
    between = autoaugment.autoaugment(images, sub_policy, first_alone, negative)
    result = autoaugment.autoaugment(images, sub_policy, applied, negative)
    for i, case in enumerate(cases.tolist()):
        for stage, (before, after) in enumerate([(images[i], between[i]), (between[i], result[i])]):
            name, _, level = POLICY[case[0]][stage]
            if applied[i, stage]:
                assert agree(name, after, by_torchvision(theirs, before, name, level, negative[i, stage])), case
            else:
                assert torch.equal(after, before), case


def test_fixed_shapes_give_the_same_images():
    g = torch.Generator().manual_seed(0)
    images = made_up(32, 32, 3).repeat(8, 1, 1, 1)
    choices = draw(len(images), g)
    expected = autoaugment.autoaugment(images, *choices, fixed_shapes=False)
    assert torch.equal(autoaugment.autoaugment(images, *choices, fixed_shapes=True), expected)
    assert not torch.equal(images, expected)


def test_no_shape_depends_on_values_off_the_cpu():
    """The meta device has no values: a shape or a branch that needed one would raise."""
    images = torch.empty(16, 32, 32, 3, dtype=torch.uint8, device="meta")
    choices = [part.to("meta") for part in draw(16, torch.Generator().manual_seed(0))]
    result = autoaugment.autoaugment(images, *choices)
    assert (result.shape, result.dtype, result.device) == (images.shape, torch.uint8, images.device)


# -- the choices


def near(count, n, p):
    """Within five standard deviations of a binomial distribution: about one false alarm in two million counts."""
    return abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


def test_choices_have_their_probabilities():
    n = 50_000
    *_, sub_policy, applied, negative = epoch_plan(Run(augment="crop+flip+autoaugment", seed=3), 2, n, CPU)
    assert sub_policy.shape == (n,) and applied.shape == negative.shape == (n, 2)
    counts = Counter(sub_policy.tolist())
    assert set(counts) == set(range(25))
    for p, operations in enumerate(POLICY):
        chosen = sub_policy == p
        assert near(counts[p], n, 1 / 25), p
        for stage, (_, probability, _) in enumerate(operations):
            assert near(applied[chosen, stage].sum().item(), counts[p], probability), (p, stage)
            assert near(negative[chosen, stage].sum().item(), counts[p], 0.5), (p, stage)
        both = operations[0][1] * operations[1][1]  # the coins are independent
        assert near(applied[chosen].all(1).sum().item(), counts[p], both), p
    assert near((negative[:, 0] & negative[:, 1]).sum().item(), n, 0.25)


def test_choices_depend_on_seed_and_epoch_and_come_last(tiny):
    run = tiny(augment="crop+flip+autoaugment")
    first = epoch_plan(run, 1, 100, CPU)
    torch.manual_seed(99)
    assert all(map(torch.equal, first, epoch_plan(run, 1, 100, CPU)))
    assert all(map(torch.equal, first[:3], epoch_plan(tiny(augment="crop+flip"), 1, 100, CPU)))
    for other in (epoch_plan(run, 2, 100, CPU), epoch_plan(tiny(augment=run.augment, seed=1), 1, 100, CPU)):
        assert not any(map(torch.equal, first, other))


# -- training


def train(run, folder, **more):
    return records.write_record(run, folder, *trainer.train(run, folder, "cpu", **more))


@pytest.fixture(scope="module")
def augmented(tiny):
    return tiny(augment="crop+flip+autoaugment")


def test_a_step_augments_what_crop_and_flip_left(augmented):
    state = trainer.Training(augmented, CPU, execution.fast(CPU))
    seen, forward = [], state.forward
    state.forward = lambda images, **arguments: (seen.append(images), forward(images, **arguments))[1]
    images, target, *choices = next(state.material.epoch(0, 0, 2))
    state.update(images, target, *choices)
    plan = epoch_plan(augmented, 0, 64, CPU)
    assert all(map(torch.equal, choices, [part[:32] for part in plan[3:]]))
    expected = autoaugment.autoaugment(images, *choices)
    assert not torch.equal(expected, images)
    assert torch.equal(seen[0], expected)


def test_an_augmented_run_resumes_where_it_stopped(augmented, tiny, comparable, tmp_path):
    whole = train(augmented, tmp_path / "whole")
    asked = iter(range(1, 10))
    with pytest.raises(Stopped, match="step 3 of 4"):
        train(augmented, tmp_path / "parts", stop=lambda: "enough" if next(asked) == 3 else None)
    torch.manual_seed(99)
    assert comparable(train(augmented, tmp_path / "parts")) == comparable(whole)
    plain = train(tiny(augment="crop+flip"), tmp_path / "plain")
    assert plain.heads[0]["train_nll"] != whole.heads[0]["train_nll"]
