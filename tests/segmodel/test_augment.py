"""`segmodel.augment` against the same transforms of full-size masks."""

import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from segmodel import augment as module
from segmodel import colours
from segmodel.augment import (
    FILL_RGB,
    MIN_VISIBLE,
    Augmentation,
    augment,
    crop,
    fit,
    flip_horizontal,
    flip_vertical,
    paste,
    resize,
    rotate90,
)
from segmodel.colours import jitter_colours
from segmodel.settings import ModelSettings, network_size
from segmodel.targets import Crop, Sample, tight

Bool = npt.NDArray[np.bool_]
Change = Callable[[Sample], Sample]

MIN_PIXELS = 4
LUMA = np.array([0.299, 0.587, 0.114])

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(1, 24)
SIZES = st.tuples(SIDES, SIDES)

# Every kind of draw, at sizes that cut, fill and turn.
EVERYTHING = Augmentation(
    min_size=40,
    max_size=60,
    size_hw=(48, 32),
    scale=(0.5, 2.0),
    flip="both",
    rotate=True,
    colour=1.0,
    copy_paste=0.7,
)


# --- Samples, and what is to hold of each -------------------------------------------------------


def random_mask(rng: np.random.Generator, size_hw: tuple[int, int]) -> Bool:
    """Draw a mask: empty, full, one pixel, a border line, scattered pixels or a rectangle."""
    height, width = size_hw
    mask = np.zeros(size_hw, np.bool_)
    kind = rng.integers(6)
    if kind == 1:
        mask[:] = True
    elif kind == 2:
        mask[rng.integers(height), rng.integers(width)] = True
    elif kind == 3:
        mask[rng.choice([0, -1])] = True
    elif kind == 4:
        mask[rng.random(size_hw) < rng.choice([0.05, 0.5])] = True
    elif kind == 5:
        y, x = rng.integers(height), rng.integers(width)
        mask[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] = True
    return mask


def sample_of(
    image: Any, masks: Sequence[Bool], first_label: int = 1, crowds_xyxy: Any = ()
) -> Sample:
    """Make a sample of full-size masks, with labels in their order; empty ones are left out."""
    crops = [tight(0, 0, mask) for mask in masks]
    return Sample(
        image_id="made",
        image=image,
        labels=np.array([first_label + n for n, c in enumerate(crops) if c], np.int64),
        masks=tuple(c for c in crops if c),
        crowds_xyxy=np.array(crowds_xyxy, np.float32).reshape(-1, 4),
    )


def random_sample(seed: int, size_hw: tuple[int, int], *, is_painted: bool = False) -> Sample:
    """Draw a sample of up to six masks that may overlap and up to two crowds.

    With `is_painted` masks are disjoint, and the pixels of each are `paint` of its label.
    """
    rng = np.random.default_rng(seed)
    height, width = size_hw
    masks = [random_mask(rng, size_hw) for _ in range(rng.integers(7))]
    image = rng.integers(0, 256, (*size_hw, 3), np.uint8)
    corners = rng.uniform(0, 1, (rng.integers(3), 2, 2)) * (width, height)
    crowds_xyxy = np.sort(corners, axis=1).reshape(-1, 4)
    first_label = 1 + 10 * int(rng.integers(20))
    if is_painted:
        masks = [
            mask & ~np.any([*masks[:n], np.zeros(size_hw)], axis=0) for n, mask in enumerate(masks)
        ]
        for n, mask in enumerate(masks):
            image[mask] = paint(first_label + n)
    return sample_of(image, masks, first_label, crowds_xyxy)


def paint(label: int) -> tuple[int, int, int]:
    return label, 255 - label, 7 * label % 256


def full(sample: Sample) -> Bool:
    """Return the masks at full size: (N, H, W)."""
    masks = np.zeros((len(sample.masks), *sample.image.shape[:2]), np.bool_)
    for canvas, mask in zip(masks, sample.masks, strict=True):
        height, width = mask.mask.shape
        canvas[mask.top : mask.top + height, mask.left : mask.left + width] = mask.mask
    return masks


def check(sample: Sample) -> None:
    """Fail unless types are right, crops tight, and everything lies in the image."""
    height, width = sample.image.shape[:2]
    assert sample.image.dtype == np.uint8
    assert sample.image.shape == (height, width, 3)
    assert sample.labels.dtype == np.int64
    assert sample.labels.shape == (len(sample.masks),)
    for mask in sample.masks:
        assert mask.mask.dtype == np.bool_
        h, w = mask.mask.shape
        assert 0 <= mask.top <= mask.top + h <= height
        assert 0 <= mask.left <= mask.left + w <= width
        assert all(line.any() for line in (mask.mask[0], mask.mask[-1]))
        assert all(line.any() for line in (mask.mask[:, 0], mask.mask[:, -1]))
    crowds = sample.crowds_xyxy
    assert crowds.dtype == np.float32
    assert crowds.shape == (len(crowds), 4)
    assert (crowds >= 0).all()
    assert (crowds <= np.float32([width, height, width, height]) * (1 + 1e-6)).all()
    assert (crowds[:, :2] <= crowds[:, 2:]).all()


def assert_same(a: Sample, b: Sample) -> None:
    assert a.image_id == b.image_id
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_array_equal(a.boxes_xyxy, b.boxes_xyxy)
    np.testing.assert_array_equal(full(a), full(b))
    np.testing.assert_allclose(a.crowds_xyxy, b.crowds_xyxy, rtol=1e-6, atol=1e-5)


def thin_out(
    sample: Sample, image: Any, masks: Bool, crowds_xyxy: Any, min_visible: float = MIN_VISIBLE
) -> Sample:
    """Return what crop and paste are to make of full-size masks of which something is gone."""
    before, after = full(sample).sum(axis=(1, 2)), masks.sum(axis=(1, 2))
    is_enough = (after >= MIN_PIXELS) & (after >= min_visible * before)
    ignored = sample_of(image, masks[(after > 0) & ~is_enough]).boxes_xyxy
    kept = sample_of(image, masks[is_enough])
    crowds = np.concatenate([np.reshape(crowds_xyxy, (-1, 4)), ignored])
    return replace(
        kept,
        labels=sample.labels[is_enough],
        crowds_xyxy=crowds.astype(np.float32),
    )


# --- Flips and turns ----------------------------------------------------------------------------


@given(SEEDS, SIZES, st.integers(-5, 9))
def test_flips_and_turns_move_full_masks_alike(
    seed: int, size_hw: tuple[int, int], times: int
) -> None:
    sample = random_sample(seed, size_hw)
    changes: list[tuple[Change, Callable[[Any], Any]]] = [
        (flip_horizontal, lambda a: a[:, ::-1]),
        (flip_vertical, lambda a: a[::-1]),
        (lambda s: rotate90(s, times), lambda a: np.rot90(a, times)),
    ]
    for change, plain in changes:
        changed = change(sample)
        check(changed)
        np.testing.assert_array_equal(changed.image, plain(sample.image))
        np.testing.assert_array_equal(changed.labels, sample.labels)
        for mask, old in zip(full(changed), full(sample), strict=True):
            np.testing.assert_array_equal(mask, plain(old))


@given(SEEDS, SIZES)
def test_crowds_move_as_masks_of_the_same_box_do(seed: int, size_hw: tuple[int, int]) -> None:
    sample = random_sample(seed, size_hw)
    sample = replace(sample, crowds_xyxy=sample.boxes_xyxy)
    changes: list[Change] = [flip_horizontal, flip_vertical]
    changes += [lambda s, n=n: rotate90(s, n) for n in range(4)]  # type: ignore[misc]
    for change in changes:
        changed = change(sample)
        np.testing.assert_array_equal(changed.crowds_xyxy, changed.boxes_xyxy)


@given(SEEDS, SIZES)
def test_flips_and_turns_come_back(seed: int, size_hw: tuple[int, int]) -> None:
    sample = random_sample(seed, size_hw)
    assert_same(flip_horizontal(flip_horizontal(sample)), sample)
    assert_same(flip_vertical(flip_vertical(sample)), sample)
    assert_same(rotate90(rotate90(sample, 1), 3), sample)
    assert_same(flip_vertical(flip_horizontal(sample)), rotate90(sample, 2))


# --- Resize -------------------------------------------------------------------------------------


def sources(old: int, new: int) -> Any:
    """Return floor((i + 0.5) old / new), and whether the centre lies between two pixels."""
    numerators = (2 * np.arange(new) + 1) * old
    return numerators // (2 * new), numerators % (2 * new) == 0


@given(SEEDS, SIZES, SIZES)
def test_resize_is_that_of_full_masks(
    seed: int, old_hw: tuple[int, int], new_hw: tuple[int, int]
) -> None:
    sample = random_sample(seed, old_hw)
    resized = resize(sample, new_hw)
    check(resized)
    (rows, row_ties), (columns, column_ties) = map(sources, old_hw, new_hw)
    expected = full(sample)[:, rows][:, :, columns]
    remains = expected.any(axis=(1, 2))
    np.testing.assert_array_equal(full(resized), expected[remains])
    np.testing.assert_array_equal(resized.labels, sample.labels[remains])
    if not len(expected):
        return
    pixels = torch.from_numpy(full(sample).astype(np.float32))[:, None]
    nearest = functional.interpolate(pixels, size=new_hw, mode="nearest-exact")[:, 0].numpy() > 0
    clear = np.ix_(~row_ties, ~column_ties)
    for mask, plain in zip(expected, nearest, strict=True):
        np.testing.assert_array_equal(mask[clear], plain[clear])


def test_torch_differs_from_the_exact_source_in_ties_only() -> None:
    for old in range(1, 130):
        pixels = torch.arange(old, dtype=torch.float32)[None, None]
        for new in range(1, 130, 2):
            nearest = functional.interpolate(pixels, size=new, mode="nearest-exact")[0, 0].numpy()
            expected, ties = sources(old, new)
            np.testing.assert_array_equal(nearest[~ties], expected[~ties])
            assert (np.abs(nearest - expected) <= ties).all()


@given(SEEDS, SIZES, SIZES)
def test_a_resized_image_is_within_one_level_of_the_predictors(
    seed: int, old_hw: tuple[int, int], new_hw: tuple[int, int]
) -> None:
    sample = random_sample(seed, old_hw)
    pixels = torch.from_numpy(sample.image).permute(2, 0, 1)[None].float()
    exact = functional.interpolate(pixels, size=new_hw, mode="bilinear", align_corners=False)
    actual = resize(sample, new_hw).image
    # Each of two passes rounds by half a level, and its weights are of 8 bits and more.
    np.testing.assert_allclose(actual, exact[0].permute(1, 2, 0).numpy(), atol=1.1)


def test_crowds_are_scaled() -> None:
    sample = sample_of(np.zeros((10, 20, 3), np.uint8), [], crowds_xyxy=[(2, 1, 20, 5)])
    assert resize(sample, (20, 10)).crowds_xyxy.tolist() == [[1, 2, 10, 10]]


def test_instances_that_vanish_are_left_out() -> None:
    masks = np.zeros((3, 9, 9), np.bool_)
    masks[0, 0, 0], masks[1, 4, 4], masks[2, 2:7, 2:7] = True, True, True
    resized = resize(sample_of(np.zeros((9, 9, 3), np.uint8), masks), (3, 3))
    assert resized.labels.tolist() == [2, 3]
    assert resized.boxes_xyxy.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


@given(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), st.integers(32, 900), st.data())
def test_fit_gives_the_size_that_the_network_takes(
    size_hw: tuple[int, int], min_size: int, data: st.DataObject
) -> None:
    max_size = data.draw(st.integers(min_size, 1400))
    settings = ModelSettings(arch="small", num_classes=2, min_size=min_size, max_size=max_size)
    assert module._fitted(size_hw, min_size, max_size) == network_size(settings, size_hw)


@given(SEEDS, SIZES)
def test_fit_and_no_augmentation_are_the_same(seed: int, size_hw: tuple[int, int]) -> None:
    sample = random_sample(seed, size_hw)
    settings = ModelSettings(arch="small", num_classes=2, min_size=32, max_size=48)
    fitted = fit(sample, 32, 48)
    assert fitted.image.shape[:2] == network_size(settings, size_hw)
    rng = np.random.default_rng(seed)
    assert_same(augment(sample, Augmentation(min_size=32, max_size=48), rng, sample), fitted)


# --- Crop ---------------------------------------------------------------------------------------


@given(SEEDS, SIZES, st.tuples(st.integers(-30, 30), st.integers(-30, 30)), SIZES, st.data())
def test_crop_is_that_of_full_masks(
    seed: int,
    old_hw: tuple[int, int],
    start: tuple[int, int],
    new_hw: tuple[int, int],
    data: st.DataObject,
) -> None:
    sample = random_sample(seed, old_hw)
    min_visible = data.draw(st.sampled_from([0.0, MIN_VISIBLE, 0.5, 1.0]))
    cropped = crop(sample, *start, new_hw, min_visible=min_visible)
    check(cropped)

    # More than the furthest window, on every side.
    space = 60
    around = ((space, space), (space, space))
    window = tuple(slice(s + space, s + space + n) for s, n in zip(start, new_hw, strict=True))
    planes = [
        np.pad(sample.image[:, :, c], around, constant_values=FILL_RGB[c])[window] for c in range(3)
    ]
    masks = np.array([np.pad(m, around)[window] for m in full(sample)], np.bool_)
    crowds = sample.crowds_xyxy - np.float32([start[1], start[0]] * 2)
    crowds = np.clip(crowds, 0, np.float32([new_hw[1], new_hw[0]] * 2))
    crowds = crowds[(crowds[:, 2:] > crowds[:, :2]).all(axis=1)]
    masks = masks.reshape(-1, *new_hw)
    assert_same(
        replace(cropped, image_id="made"),
        thin_out(sample, np.stack(planes, axis=2), masks, crowds, min_visible),
    )


def test_a_remnant_is_ignored_rather_than_background() -> None:
    mask = np.zeros((30, 30), np.bool_)
    mask[5:15, 5:15] = True
    sample = sample_of(np.zeros((30, 30, 3), np.uint8), [mask])
    for left, is_kept in [(14, True), (15, False)]:
        cropped = crop(sample, 0, left, (30, 15))
        assert bool(cropped.masks) == is_kept
    # 9 of 100 pixels are left, then 10; then none.
    assert crop(sample, 6, 14, (20, 16)).crowds_xyxy.tolist() == [[0, 0, 1, 9]]
    assert crop(sample, 5, 14, (20, 16)).boxes_xyxy.tolist() == [[0, 0, 1, 10]]
    assert crop(sample, 15, 15, (10, 10)).crowds_xyxy.tolist() == []


def test_what_lies_outside_is_nothing_to_the_network() -> None:
    settings = ModelSettings(arch="small", num_classes=2, min_size=32, max_size=48)
    fill = np.array(FILL_RGB) / 255
    assert (np.abs(fill - settings.image_mean) <= 0.5 / 255 + 1e-9).all()


# --- Paste --------------------------------------------------------------------------------------


@given(SEEDS, SEEDS, SEEDS, SIZES)
def test_paste_is_that_of_full_masks(
    seed: int, donor_seed: int, draw: int, size_hw: tuple[int, int]
) -> None:
    sample, donor = random_sample(seed, size_hw), random_sample(donor_seed, size_hw)
    # Labels that say which ones were pasted.
    donor = replace(donor, labels=np.arange(1000, 1000 + len(donor.labels)))
    pasted = paste(sample, donor, np.random.default_rng(draw))
    check(pasted)

    chosen = [n for n, label in enumerate(donor.labels) if label in pasted.labels]
    above = full(donor)[chosen]
    covered = above.any(axis=0)
    image = np.where(covered[:, :, None], donor.image, sample.image)
    below = thin_out(sample, image, full(sample) & ~covered, sample.crowds_xyxy)
    assert_same(
        pasted,
        replace(
            below,
            labels=np.concatenate([below.labels, donor.labels[chosen]]),
            masks=(*below.masks, *(donor.masks[n] for n in chosen)),
        ),
    )
    # What went in stays as it was.
    assert_same(sample, random_sample(seed, size_hw))
    # Tiny ones are ignored in the donor, too, so they are not pasted.
    assert all(mask.sum() >= MIN_PIXELS for mask in above)


def test_about_half_of_the_donor_is_pasted() -> None:
    masks = np.zeros((16, 16, 16), np.bool_)
    for n, mask in enumerate(masks):
        mask[n // 4 * 4 : n // 4 * 4 + 3, n % 4 * 4 : n % 4 * 4 + 3] = True
    empty, donor = sample_of(np.zeros((16, 16, 3), np.uint8), []), np.ones((16, 16, 3), np.uint8)
    numbers = [
        len(paste(empty, sample_of(donor, masks), np.random.default_rng(seed)).masks)
        for seed in range(200)
    ]
    assert 7.5 < np.mean(numbers) < 8.5
    assert len(set(numbers)) > 5


@given(SEEDS, SIZES, SIZES)
def test_donors_of_any_size(seed: int, size_hw: tuple[int, int], donor_hw: tuple[int, int]) -> None:
    sample, donor = random_sample(seed, size_hw), random_sample(seed + 1, donor_hw, is_painted=True)
    donor = replace(donor, labels=donor.labels % 10 + 200)
    rng = np.random.default_rng(seed)
    pasted = paste(sample, donor, rng)
    check(pasted)
    assert pasted.image.shape == sample.image.shape


# --- Colours ------------------------------------------------------------------------------------


@given(SEEDS, SIZES, st.floats(0, 1))
def test_colours_are_the_plain_map(seed: int, size_hw: tuple[int, int], strength: float) -> None:
    sample = random_sample(seed, size_hw)
    jittered = jitter_colours(sample, strength, np.random.default_rng(seed))
    mean = float(sample.image[::4, ::4].reshape(-1, 3).mean(axis=0) @ LUMA)
    matrix, offset = colours._draw_colours(strength, mean, np.random.default_rng(seed))
    exact = np.clip(sample.image @ matrix.T.astype(np.float64) + offset, 0, 255)
    np.testing.assert_allclose(jittered.image, exact, atol=0.51)
    assert jittered.masks is sample.masks
    check(jittered)


def changes(draws: int = 2000, strength: float = 1.0) -> tuple[Any, Any]:
    """Return many maps of colours, of an image of mean 100: (D, 3, 3) and (D, 3)."""
    rng = np.random.default_rng(0)
    maps = [colours._draw_colours(strength, 100.0, rng) for _ in range(draws)]
    return np.array([matrix for matrix, _ in maps]), np.array([offset for _, offset in maps])


def test_grey_stays_grey_and_the_mean_stays_but_for_brightness() -> None:
    matrix, offset = changes()
    mapped = matrix @ np.full(3, 100.0) + offset
    np.testing.assert_allclose(mapped - mapped[:, :1], 0, atol=1e-3)
    is_inverted = matrix.sum(axis=(1, 2)) < 0
    brightness = np.where(is_inverted, 255 - mapped[:, 0], mapped[:, 0]) / 100
    assert 0.6 <= brightness.min() < 0.62
    assert 1.38 < brightness.max() <= 1.4001


def test_chances_of_grey_and_inverted() -> None:
    for strength in (1.0, 0.5):
        matrix, _ = changes(strength=strength)
        # Grey: all three outputs are the same.
        is_grey = np.abs(matrix - matrix[:, :1]).max(axis=(1, 2)) < 1e-5
        is_inverted = matrix.sum(axis=(1, 2)) < 0
        assert is_grey.mean() == pytest.approx(0.2 * strength, abs=0.03)
        assert is_inverted.mean() == pytest.approx(0.1 * strength, abs=0.03)


def test_the_compiled_map_is_the_plain_one() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (9, 7, 3), np.uint8)
    for strength in (0.0, 0.5, 1.0):
        matrix, offset = colours._draw_colours(strength, 100.0, rng)
        compiled = colours._mapped(image, matrix, offset).astype(int)
        # Compiled, sums may be rounded otherwise: where they end in a half, by a level.
        np.testing.assert_allclose(compiled, colours._map_colours(image, matrix, offset), atol=1)


def test_strength_0_changes_no_colour() -> None:
    sample = random_sample(1, (20, 20))
    for seed in range(20):
        jittered = jitter_colours(sample, 0, np.random.default_rng(seed))
        np.testing.assert_array_equal(jittered.image, sample.image)


def test_colours_of_memory_that_is_read_only_or_a_view() -> None:
    sample = random_sample(3, (9, 7))
    expected = jitter_colours(sample, 1, np.random.default_rng(0)).image
    frozen = sample.image.copy()
    frozen.flags.writeable = False
    for image in (frozen, np.asfortranarray(sample.image), sample.image[::-1].copy()[::-1]):
        jittered = jitter_colours(replace(sample, image=image), 1, np.random.default_rng(0))
        np.testing.assert_array_equal(jittered.image, expected)


# --- All together -------------------------------------------------------------------------------


def random_change(rng: np.random.Generator, seed: int) -> Change:
    def paste_painted(sample: Sample) -> Sample:
        size_hw = sample.image.shape[:2]
        return paste(sample, random_sample(seed, size_hw, is_painted=True), rng)

    def crop_somewhere(sample: Sample) -> Sample:
        top, left = rng.integers(-6, 7, 2).tolist()
        height, width = rng.integers(1, 30, 2).tolist()
        return crop(sample, top, left, (height, width))

    kinds: list[Change] = [
        flip_horizontal,
        flip_vertical,
        lambda sample: rotate90(sample, int(rng.integers(4))),
        crop_somewhere,
        paste_painted,
    ]
    return kinds[rng.integers(len(kinds))]


@given(SEEDS, SIZES, st.integers(1, 8))
def test_pixels_move_with_their_masks(seed: int, size_hw: tuple[int, int], length: int) -> None:
    rng = np.random.default_rng(seed)
    sample = random_sample(seed, size_hw, is_painted=True)
    for step in range(length):
        sample = random_change(rng, seed + step + 1)(sample)
        check(sample)
        for label, mask in zip(sample.labels.tolist(), full(sample), strict=True):
            assert (sample.image[mask] == paint(label)).all()


def squares(labels: Sequence[int], size_hw: tuple[int, int] = (60, 90)) -> Sample:
    """Make a sample of painted squares of 20 pixels on noise."""
    image = np.random.default_rng(labels[0]).integers(0, 256, (*size_hw, 3), np.uint8)
    masks = np.zeros((len(labels), *size_hw), np.bool_)
    for n, (label, mask) in enumerate(zip(labels, masks, strict=True)):
        y, x = divmod(n, 3)
        mask[5 + 25 * y : 25 + 25 * y, 5 + 25 * x : 25 + 25 * x] = True
        image[mask] = paint(label)
    return replace(sample_of(image, masks), labels=np.array(labels))


@pytest.mark.parametrize("size_hw", [None, (48, 32), (100, 100)])
def test_pixels_move_with_their_masks_through_all_of_it(size_hw: tuple[int, int] | None) -> None:
    augmentation = replace(EVERYTHING, size_hw=size_hw, colour=0.0)
    num_masks = 0
    for seed in range(100):
        sample = augment(
            squares([10, 30, 50, 70, 90, 110]),
            augmentation,
            np.random.default_rng(seed),
            squares([20, 40, 60, 80, 100], (80, 70)),
        )
        check(sample)
        for label, mask in zip(sample.labels.tolist(), full(sample), strict=True):
            # At their edges pixels are mixed; the middle of a small remnant may be an edge, too.
            if mask.sum() >= 100:
                off = np.abs(sample.image[mask].astype(int) - paint(label)).max(axis=1)
                assert np.median(off) <= 1
                num_masks += 1
    assert num_masks > 100


@given(SEEDS, SIZES, SIZES, st.booleans())
def test_a_seed_is_a_sample(
    seed: int, size_hw: tuple[int, int], donor_hw: tuple[int, int], is_whole: bool
) -> None:
    augmentation = replace(EVERYTHING, size_hw=None if is_whole else EVERYTHING.size_hw)
    sample, donor = random_sample(seed, size_hw), random_sample(seed + 1, donor_hw)
    one, two = (augment(sample, augmentation, np.random.default_rng(seed), donor) for _ in range(2))
    check(one)
    assert_same(one, two)
    if not is_whole:
        assert one.image.shape == (48, 32, 3)
    elif size_hw != (1, 1):
        assert max(one.image.shape[:2]) <= EVERYTHING.max_size
    # What went in stays as it was.
    assert_same(sample, random_sample(seed, size_hw))
    assert_same(donor, random_sample(seed + 1, donor_hw))


def test_seeds_differ() -> None:
    sample = squares([10, 30, 50])
    images = {
        augment(sample, EVERYTHING, np.random.default_rng(seed)).image.tobytes()
        for seed in range(20)
    }
    assert len(images) == 20


@pytest.mark.parametrize("is_empty", [True, False])
def test_one_pixel(is_empty: bool) -> None:
    masks = [] if is_empty else [np.ones((1, 1), np.bool_)]
    sample = sample_of(np.full((1, 1, 3), 9, np.uint8), masks)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        check(augment(sample, EVERYTHING, rng, sample))
        check(augment(sample, replace(EVERYTHING, size_hw=(1, 1)), rng, sample))
    assert_same(resize(resize(sample, (7, 3)), (1, 1)), sample)


def test_a_sample_without_instances_stays_without() -> None:
    sample = sample_of(np.zeros((30, 40, 3), np.uint8), [], crowds_xyxy=[(3, 4, 20, 20)])
    varied = [augment(sample, EVERYTHING, np.random.default_rng(s), sample) for s in range(50)]
    assert not any(one.masks for one in varied)
    assert all(one.labels.shape == (0,) for one in varied)
    assert any(len(one.crowds_xyxy) for one in varied)


def test_windows_mostly_hold_an_instance() -> None:
    mask = np.zeros((400, 400), np.bool_)
    mask[200:210, 190:200] = True
    sample = sample_of(np.zeros((400, 400, 3), np.uint8), [mask])
    augmentation = Augmentation(min_size=400, max_size=400, size_hw=(64, 64))
    varied = [augment(sample, augmentation, np.random.default_rng(s)) for s in range(300)]
    found = [one for one in varied if one.masks]
    assert 0.82 < len(found) / len(varied) < 0.97
    # And that anywhere in them.
    middles = np.concatenate([one.boxes_xyxy for one in found])[:, :2]
    assert (np.abs(middles.mean(axis=0) - 27) < 5).all()


def test_windows_reach_every_place_and_need_no_padding() -> None:
    rows, columns = np.mgrid[:20, :30].astype(np.uint8)
    sample = sample_of(np.stack([rows, columns, columns], axis=2), [])
    augmentation = Augmentation(min_size=20, max_size=30, size_hw=(12, 18), rotate=True)
    rng = np.random.default_rng(0)
    seen = np.zeros((20, 30), np.bool_)
    for _ in range(1000):
        image = augment(sample, augmentation, rng).image
        assert image.max() < 30
        seen[image[:, :, 0], image[:, :, 1]] = True
    assert seen.all()


def test_scales_are_uniform_and_the_longer_side_is_bounded() -> None:
    sample = sample_of(np.zeros((100, 150, 3), np.uint8), [])
    whole = Augmentation(min_size=100, max_size=200, scale=(0.5, 2.0))
    rng = np.random.default_rng(0)
    sizes = np.array([augment(sample, whole, rng).image.shape[:2] for _ in range(1000)])
    assert sizes[:, 0].min() < 55
    # 200 pixels of the longer side are 133 of the shorter: reached from a factor of 4/3 on.
    assert sizes.max() in (199, 200)
    assert np.mean(sizes[:, 0] >= 132) == pytest.approx(0.68 / 1.5, abs=0.05)
    assert np.median(sizes[:, 0]) == pytest.approx(125, abs=10)


def test_a_small_view_is_padded_at_a_random_place() -> None:
    sample = sample_of(np.zeros((10, 10, 3), np.uint8), [np.ones((10, 10), np.bool_)])
    augmentation = Augmentation(min_size=10, max_size=10, size_hw=(20, 30))
    places = set()
    for seed in range(300):
        one = augment(sample, augmentation, np.random.default_rng(seed))
        (mask,) = one.masks
        places.add((mask.top, mask.left))
        is_filled = (one.image == FILL_RGB).all(axis=2)
        np.testing.assert_array_equal(is_filled, ~full(one)[0])
    assert {top for top, _ in places} == set(range(11))
    assert {left for _, left in places} == set(range(21))


def test_padding_keeps_its_colour() -> None:
    sample = sample_of(np.zeros((10, 10, 3), np.uint8), [np.ones((10, 10), np.bool_)])
    augmentation = Augmentation(min_size=10, max_size=10, size_hw=(20, 30), colour=1.0)
    for seed in range(20):
        one = augment(sample, augmentation, np.random.default_rng(seed))
        assert (one.image[~full(one)[0]] == FILL_RGB).all()


def test_full_masks_are_made_nowhere() -> None:
    """A full mask of this image would have 9 MB, one for each instance 450."""
    side, many = 3000, 50
    image = np.zeros((side, side, 3), np.uint8)
    spot = np.ones((9, 9), np.bool_)
    masks = tuple(Crop(top=60 * n, left=50 * n, mask=spot) for n in range(many))
    sample = Sample(
        image_id="large",
        image=image,
        labels=np.ones(many, np.int64),
        masks=masks,
        crowds_xyxy=np.zeros((0, 4), np.float32),
    )
    changes: list[Change] = [
        lambda s: rotate90(flip_vertical(flip_horizontal(s)), 1),
        lambda s: crop(s, 1, 1, (side - 2, side - 2)),
        # torch's image is not counted here, and is nobody's mask.
        lambda s: resize(s, (side // 2, side)),
    ]
    for change in changes:
        tracemalloc.start()
        assert len(change(sample).masks) == many
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**20
    tracemalloc.start()
    assert len(paste(sample, sample, np.random.default_rng(0)).masks) >= many
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < image.nbytes + 2**20


# --- Settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"min_size": 0}, "min_size"),
        ({"min_size": 61}, "max_size"),
        ({"size_hw": (0, 5)}, "size_hw"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (2.0, 1.0)}, "scale"),
        ({"scale": (1.0, float("inf"))}, "scale"),
        ({"scale": (float("nan"), 1.0)}, "scale"),
        ({"flip": "vertical"}, "flip"),
        ({"colour": 1.1}, "colour"),
        ({"colour": float("nan")}, "colour"),
        ({"copy_paste": -0.1}, "copy_paste"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(EVERYTHING, **change)
