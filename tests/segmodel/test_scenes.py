import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from segmodel import rle as rle_
from segmodel.scenes import CATEGORIES, Scene, coco, scene

SCENES = [scene(seed) for seed in range(60)]


def same(a: Scene, b: Scene) -> bool:
    return (
        np.array_equal(a.image, b.image)
        and np.array_equal(a.masks, b.masks)
        and a.category_ids == b.category_ids
    )


def test_shapes_and_types() -> None:
    for size_hw in ((256, 320), (64, 48), (300, 200)):
        one = scene(1, size_hw)
        n = len(one.category_ids)
        assert (one.image.shape, one.image.dtype) == ((*size_hw, 3), np.uint8)
        assert (one.masks.shape, one.masks.dtype) == ((n, *size_hw), np.bool_)
        assert one.image.flags.writeable
        assert all(type(category_id) is int for category_id in one.category_ids)


def test_a_seed_is_a_scene() -> None:
    assert same(scene(5), SCENES[5])
    assert not same(SCENES[5], SCENES[6])


def test_a_seed_stays_the_same_scene() -> None:
    """The shipped model's training set is made of seeds; a changed picture is another set."""
    one = SCENES[3]
    assert one.category_ids == [1, 1, 1, 2, 4, 4]
    np.testing.assert_allclose(one.masks.sum(axis=(1, 2)), [258, 244, 2734, 91, 247, 68], atol=3)
    np.testing.assert_allclose(one.image.mean(axis=(0, 1)), [88.4, 103.4, 94.5], atol=0.5)


def test_masks_are_disjoint_and_recognisable() -> None:
    for one in SCENES:
        assert one.masks.sum(axis=0).max(initial=0) <= 1
        assert all(mask.sum() >= 40 for mask in one.masks)


def test_numbers_of_objects_and_categories() -> None:
    counts = [len(one.masks) for one in SCENES]
    assert all(count == 0 or count <= 9 for count in counts)
    assert 0 in counts
    assert np.mean([count == 0 for count in counts]) < 0.15
    assert np.mean([count >= 3 for count in counts]) > 0.85
    seen = [category_id for one in SCENES for category_id in one.category_ids]
    assert set(seen) == {1, 2, 4, 7} == {category.id for category in CATEGORIES}
    assert np.bincount(seen)[[1, 2, 4, 7]].min() > 0.15 * len(seen)


def test_sizes_span_the_range() -> None:
    sides = [max(np.ptp(np.nonzero(mask), axis=1) + 1) for one in SCENES for mask in one.masks]
    assert min(sides) < 18
    assert 85 < max(sides) <= 0.4 * 256 + 2


def test_objects_hide_each_other() -> None:
    """A scene's boxes overlap though its masks do not."""
    hidden = 0
    for one in SCENES:
        boxes = [np.array(np.nonzero(mask)) for mask in one.masks]
        spans = [(box.min(axis=1), box.max(axis=1)) for box in boxes]
        hidden += any(
            (a[0] <= b[1]).all() and (b[0] <= a[1]).all()
            for i, a in enumerate(spans)
            for b in spans[:i]
        )
    assert hidden > len(SCENES) / 3


def test_masks_lie_on_what_is_painted() -> None:
    """An object's colour changes at its outline far more than the table does elsewhere."""
    differences = {True: [], False: []}
    for one in SCENES[:20]:
        steps = np.abs(np.diff(one.image.astype(int), axis=1)).sum(axis=2)
        owner = (one.masks * np.arange(1, len(one.masks) + 1)[:, None, None]).sum(axis=0)
        edge = np.diff(owner, axis=1) != 0
        differences[True].append(steps[edge])
        differences[False].append(steps[~edge])
    assert np.concatenate(differences[True]).mean() > 3 * np.concatenate(differences[False]).mean()


def test_rings_have_holes() -> None:
    rings = [
        mask
        for one in SCENES
        for mask, category_id in zip(one.masks, one.category_ids, strict=True)
        if category_id == 7
    ]
    with_hole = 0
    for ring in rings:
        rows, columns = np.nonzero(ring)
        with_hole += not ring[round(rows.mean()), round(columns.mean())]
    assert with_hole > 0.7 * len(rings)


def test_coco_file_is_read_by_pycocotools(tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(len(SCENES))]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco(SCENES, names)))
    truth = COCO(str(path))
    assert [truth.imgs[i + 1]["file_name"] for i in range(len(SCENES))] == names
    assert truth.cats[7] == {"id": 7, "name": "ring"}
    for i, one in enumerate(SCENES, start=1):
        annotations = truth.loadAnns(truth.getAnnIds(imgIds=i))
        assert [annotation["category_id"] for annotation in annotations] == one.category_ids
        for annotation, mask in zip(annotations, one.masks, strict=True):
            np.testing.assert_array_equal(rle_.decode(truth.annToRLE(annotation)), mask)
            rows, columns = np.nonzero(mask)
            size = [int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
            assert annotation["bbox"] == [columns.min(), rows.min(), *size]
            assert annotation["area"] == mask.sum()
            assert annotation["iscrowd"] == 0


def test_coco_wants_a_name_for_each_scene() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        coco(SCENES, ["only.jpg"])
