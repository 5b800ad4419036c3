"""The predictor against torchvision's own models, and against itself in other company."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partialmethod
from itertools import chain
from typing import Any, get_args

import numpy as np
import pycocotools.mask as coco
import pytest
import torch
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.ops import FrozenBatchNorm2d, box_iou

from segmodel import inference, masks
from segmodel.bundle import Bundle
from segmodel.images import Picture
from segmodel.inference import LOOK_AHEAD_BATCHES, Image, Predictor
from segmodel.model import mask_rcnn
from segmodel.network_input import Batch, DeviceInput
from segmodel.schema import Detections, Rle
from segmodel.settings import Architecture, Precision
from segmodel.winograd import WinogradConv2d

MakeBundle = Callable[..., Bundle]
MakeImage = Callable[..., Image]

# Landscape, portrait, smaller than the network's input, one pixel, and extremes: (2, 96) and (96, 2)
# are what the network sees of the last two. An ordinary one comes first: from the first image that it
# sees torchvision infers RoIAlign's scales, of extreme ones wrongly.
SIZES = [(90, 120), (150, 101), (7, 9), (1, 1), (20, 700), (700, 20)]
# Mixed sizes, of which several share a padded size.
MIXED = [(90, 120), (64, 64), (91, 122), (150, 101), (300, 10), (92, 121)]


@pytest.fixture(scope="module")
def small(lively: MakeBundle) -> Bundle:
    return lively("small", 4, 32, 64)


@pytest.fixture(scope="module")
def predictor(small: Bundle) -> Predictor:
    return Predictor(small, "cpu")


@pytest.fixture(scope="module")
def alone(predictor: Predictor, image: MakeImage) -> list[Detections]:
    """What is found in each image of `MIXED` alone."""
    return [predictor.predict([image(*size)])[0] for size in MIXED]


def torchvision_model(bundle: Bundle) -> MaskRCNN:
    """Return torchvision's model of a bundle's weights; for `small` its module, without our predictor."""
    settings = bundle.settings
    options = {
        "num_classes": settings.num_classes,
        "min_size": settings.min_size,
        "max_size": settings.max_size,
        "box_score_thresh": bundle.score_threshold,
        "box_detections_per_img": bundle.max_detections,
    }
    match settings.arch:
        case "maskrcnn_resnet50_fpn":
            model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, **options)
        case "maskrcnn_resnet50_fpn_v2":
            model = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, **options)
        case "small":
            model = mask_rcnn(settings)
            model.roi_heads.score_thresh = bundle.score_threshold
            model.roi_heads.detections_per_img = bundle.max_detections
    model.load_state_dict(dict(bundle.weights))
    return model.eval()


def run(model: MaskRCNN, image: Image) -> dict[str, Any]:
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous().float().div(255)
    with torch.inference_mode():
        found = model([pixels])[0]
    return {name: tensor.numpy() for name, tensor in found.items()}


def encoded(binary: Any) -> list[Rle]:
    rles = coco.encode(np.asfortranarray(binary[:, 0].transpose(1, 2, 0).astype(np.uint8)))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in rles]


def assert_as_torchvision(found: Detections, expected: dict[str, Any]) -> None:
    assert np.array_equal(found.boxes_xyxy, expected["boxes"])
    assert np.array_equal(found.scores, expected["scores"])
    assert np.array_equal(found.labels, expected["labels"])
    assert found.mask_probs is not None
    rles = masks.encode(found.mask_probs, found.boxes_xyxy, found.size_hw)
    assert rles == encoded(expected["masks"] > 0.5)


def assert_equal(found: Detections, expected: Detections) -> None:
    assert found.size_hw == expected.size_hw
    for name in ("boxes_xyxy", "scores", "labels", "mask_probs"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def share_kept(found: Detections, expected: Detections) -> float:
    """Return the share of `expected` that `found` has too, up to roundings.

    A convolution adds in another order for another batch. That moves features by 5e-6 of their range;
    random weights make up to 3e-3 pixels, 6e-5 of a score and 2e-3 of a mask of it, and where two
    scores or overlaps are nearly equal, another order or choice.
    """
    assert found.size_hw == expected.size_hw
    assert found.mask_probs is not None
    assert expected.mask_probs is not None
    boxes = np.abs(expected.boxes_xyxy[:, None] - found.boxes_xyxy).max(axis=2)
    scores = np.abs(expected.scores[:, None] - found.scores)
    probs = np.abs(expected.mask_probs[:, None] - found.mask_probs).max(axis=(2, 3))
    labels = expected.labels[:, None] == found.labels
    same = labels & (boxes < 2e-2) & (scores < 1e-3) & (probs < 2e-2)
    return float(same.any(axis=1).mean())


@pytest.mark.parametrize(
    ("arch", "network_hw", "sizes"),
    [
        ("small", (64, 96), SIZES),
        ("maskrcnn_resnet50_fpn", (32, 64), [*SIZES[:3], SIZES[-1]]),
        ("maskrcnn_resnet50_fpn_v2", (32, 64), SIZES[:2]),
    ],
)
def test_agrees_exactly_with_torchvision(
    lively: MakeBundle,
    image: MakeImage,
    arch: str,
    network_hw: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
) -> None:
    bundle = lively(arch, 4, *network_hw)
    predictor, model = Predictor(bundle, "cpu", "fp32"), torchvision_model(bundle)
    labels: set[int] = set()
    for size in sizes:
        found = predictor.predict([image(*size)])[0]
        assert_as_torchvision(found, run(model, image(*size)))
        assert len(found) >= (bundle.max_detections if min(size) > 50 else 5)
        labels.update(found.labels.tolist())
    assert labels == {1, 2, 3}


def test_agrees_exactly_with_torchvision_at_full_size(lively: MakeBundle, image: MakeImage) -> None:
    bundle = lively("maskrcnn_resnet50_fpn", 4, 800, 1333)
    found = Predictor(bundle, "cpu", "fp32").predict([image(480, 640)])[0]
    assert len(found) == bundle.max_detections
    assert_as_torchvision(found, run(torchvision_model(bundle), image(480, 640)))


def test_agrees_exactly_with_torchvision_of_another_normalisation(
    small: Bundle, image: MakeImage
) -> None:
    settings = replace(small.settings, image_mean=(0.3, 0.4, 0.6), image_std=(0.5, 0.25, 0.2))
    other = replace(small, settings=settings, digest="")
    found = Predictor(other, "cpu", "fp32").predict([image(90, 120)])[0]
    model = torchvision_model(other)
    model.transform.image_mean, model.transform.image_std = [0.3, 0.4, 0.6], [0.5, 0.25, 0.2]
    assert_as_torchvision(found, run(model, image(90, 120)))
    assert not np.array_equal(
        found.boxes_xyxy, Predictor(small, "cpu", "fp32").predict([image(90, 120)])[0].boxes_xyxy
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 3000)])
def test_an_image_of_any_shape_has_boxes_within_it(
    predictor: Predictor, image: MakeImage, size: tuple[int, int]
) -> None:
    found = predictor.predict([image(*size)])[0]
    assert len(found) >= 5
    assert found.size_hw == size
    assert (found.boxes_xyxy >= 0).all()
    # A box that ends with the image may do so with the error of one multiplication.
    limits = np.array([size[1], size[0]] * 2, np.float32) * np.float32(1 + 1e-6)
    assert (found.boxes_xyxy <= limits).all()
    assert (found.boxes_xyxy[:, 2:] > found.boxes_xyxy[:, :2]).all()
    assert (np.diff(found.scores) <= 0).all()
    assert found.mask_probs is not None
    assert len(masks.encode(found.mask_probs, found.boxes_xyxy, size)) == len(found)


@pytest.mark.parametrize("first", [(10, 300), (1, 3000), (300, 10)])
def test_the_first_image_does_not_shape_what_follows(
    small: Bundle, alone: list[Detections], image: MakeImage, first: tuple[int, int]
) -> None:
    predictor = Predictor(small, "cpu")
    predictor.predict([image(*first)])
    assert_equal(predictor.predict([image(*MIXED[0])])[0], alone[0])


def test_a_batch_of_one_is_bit_equal_in_any_company(
    predictor: Predictor, alone: list[Detections], image: MakeImage
) -> None:
    found = predictor.predict([image(*size) for size in reversed(MIXED)])
    for together, expected in zip(reversed(found), alone, strict=True):
        assert_equal(together, expected)


@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_batch_mates_change_nothing_but_roundings(
    small: Bundle, alone: list[Detections], image: MakeImage, batch_size: int
) -> None:
    predictor = Predictor(small, "cpu", batch_size=batch_size)
    shapes = []
    predictor.model.backbone.register_forward_pre_hook(
        lambda _module, inputs: shapes.append(inputs[0].shape)
    )
    found = predictor.predict([image(*size) for size in MIXED])
    for together, expected in zip(found, alone, strict=True):
        assert len(together) == len(expected)
        assert share_kept(together, expected) >= 0.9
    # Images of different sizes did share batches, which kept to their size.
    assert len(shapes) < len(MIXED)
    assert sum(shape[0] for shape in shapes) == len(MIXED)
    assert 2 <= max(shape[0] for shape in shapes) <= batch_size


def test_a_picture_with_fewer_pixels_than_its_file_has_the_files_size(
    predictor: Predictor, image: MakeImage
) -> None:
    whole = image(90, 120)
    (found,) = predictor.predict([Picture(whole, (90, 120))])
    assert_equal(found, predictor.predict([whole])[0])
    flat = np.full((180, 240, 3), 90, np.uint8)
    (found,) = predictor.predict([Picture(flat[::4, ::4].copy(), (180, 240))])
    assert share_kept(found, predictor.predict([flat])[0]) > 0.9
    assert found.boxes_xyxy.max() > 120


def test_stream_takes_images_only_as_it_needs_them(small: Bundle, image: MakeImage) -> None:
    taken: list[int] = []

    def images() -> Iterator[tuple[int, Image]]:
        for number in range(100, 108):
            taken.append(number)
            yield number, image(70 + 2 * (number % 2), 64)

    stream = Predictor(small, "cpu").stream(images())
    assert next(stream)[0] == 100
    assert taken == [100]
    assert next(stream)[0] == 101
    assert taken == [100, 101]
    taken.clear()
    # 70 and 72 rows are padded alike, so the first four make the first batch of four.
    numbers = [number for number, _ in Predictor(small, "cpu", batch_size=4).stream(images())]
    assert numbers == taken == list(range(100, 108))


def test_stream_holds_four_batches_at_most(small: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = replace(small, settings=replace(small.settings, min_size=32, max_size=640), digest="")
    predictor = Predictor(wide, "cpu", batch_size=2)
    # What a batch is made of is enough.
    monkeypatch.setattr(predictor, "_predict_batch", lambda images, **_: images)
    taken = given = most = 0

    def images() -> Iterator[tuple[int, Image]]:
        nonlocal taken
        # Ten padded sizes by turns, so that no batch fills before the look-ahead ends.
        for number in range(40):
            taken += 1
            yield number, np.zeros((32, 32 + 32 * (number % 10), 3), np.uint8)

    for _ in predictor.stream(images()):
        given += 1
        most = max(most, taken - given)
    assert given == taken == 40
    # The first of a batch of two was given, the second not yet counted.
    assert 2 < most <= 2 * LOOK_AHEAD_BATCHES - 1


def test_two_threads_find_what_one_finds(
    predictor: Predictor, alone: list[Detections], image: MakeImage
) -> None:
    images = [image(*size) for size in MIXED]
    start = threading.Barrier(2)

    def predict(order: Sequence[int]) -> list[Detections]:
        start.wait()
        return predictor.predict([images[n] for n in order])

    orders = [range(len(MIXED)), range(len(MIXED) - 1, -1, -1)]
    with ThreadPoolExecutor(2) as threads:
        for order, found in zip(orders, threads.map(predict, orders), strict=True):
            for n, detections in zip(order, found, strict=True):
                assert_equal(detections, alone[n])


def test_one_batch_is_in_the_network_at_a_time(small: Bundle, image: MakeImage) -> None:
    """The device's memory holds one batch, however many threads there are."""
    predictor = Predictor(small, "cpu", masks=False)
    inside = most = 0
    another = threading.Event()

    def enter(*_: object) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        if inside > 1:
            another.set()
        # Time for the other thread to come in, if it can.
        another.wait(0.2)

    def leave(*_: object) -> None:
        nonlocal inside
        inside -= 1

    predictor.model.backbone.register_forward_pre_hook(enter)
    predictor.model.roi_heads.box_predictor.register_forward_hook(leave)
    start = threading.Barrier(2)

    def predict(_number: int) -> None:
        start.wait()
        predictor.predict([image(64, 64)])

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(predict, range(2)))
    assert (most, inside) == (1, 0)


@pytest.fixture
def like_a_gpu(small: Bundle) -> Predictor:
    """A predictor that uploads photos beside the network, to this CPU, and resizes as on a GPU."""
    predictor = Predictor(small, "cpu", batch_size=4)
    predictor._ahead = True
    predictor._input = DeviceInput(small.settings, torch.device("cpu"), torch.channels_last)
    return predictor


def test_photos_resized_on_the_device_give_the_same_detections(
    like_a_gpu: Predictor, alone: list[Detections], image: MakeImage
) -> None:
    found = like_a_gpu.predict([image(*size) for size in MIXED])
    for together, expected in zip(found, alone, strict=True):
        assert share_kept(together, expected) >= 0.9


def test_a_batch_is_uploaded_while_another_is_in_the_network(
    like_a_gpu: Predictor, image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded, inside = threading.Semaphore(0), threading.Event()
    upload = like_a_gpu._input.batch

    def tell(images: Sequence[Picture]) -> Batch:
        batch = upload(images)
        uploaded.release()
        return batch

    def wait_for_the_other(*_: object) -> None:
        if not inside.is_set():
            inside.set()
            assert uploaded.acquire(timeout=60)
            assert uploaded.acquire(timeout=60), "the other one waits for the network"

    monkeypatch.setattr(like_a_gpu._input, "batch", tell)
    like_a_gpu.model.backbone.register_forward_pre_hook(wait_for_the_other)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(like_a_gpu.predict, [[image(64, 64)]] * 2))
    assert_equal(found[0][0], found[1][0])


def test_look_ahead_on_a_gpu_is_of_bytes(
    like_a_gpu: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "LOOK_AHEAD_BYTES", 12 * 64 * 64 * 3)
    # Eight shapes by turns, of which none has four before twelve of this many bytes wait.
    shapes = [(64, 64 + 64 * number) for number in range(8)]
    blanks = [np.zeros((64 * 64 // width, width, 3), np.uint8) for _, width in shapes]
    pictures = [(number, Picture(blanks[number % 8], shapes[number % 8])) for number in range(32)]
    monkeypatch.setattr(like_a_gpu, "_padded_size", lambda picture: picture.size_hw)
    groups = [[number for number, _ in group] for group in like_a_gpu._batches(pictures)]
    assert groups[:3] == [[0, 8], [1, 9], [2, 10]]
    assert sorted(chain.from_iterable(groups)) == list(range(32))
    monkeypatch.setattr(inference, "LOOK_AHEAD_BYTES", 2**30)
    assert [len(group) for group in like_a_gpu._batches(pictures)] == [4] * 8


def test_no_images_give_no_detections(predictor: Predictor) -> None:
    assert predictor.predict([]) == []


def test_nothing_found_is_empty_arrays(small: Bundle, image: MakeImage) -> None:
    predictor = Predictor(small, "cpu", score_threshold=1.0)
    found = predictor.predict([image(64, 64), image(70, 64)])[1]
    assert len(found) == 0
    assert found.mask_probs is not None
    assert found.mask_probs.shape == (0, 28, 28)
    assert masks.encode(found.mask_probs, found.boxes_xyxy, found.size_hw) == []


def test_boxes_alone_are_the_same_boxes(
    small: Bundle, alone: list[Detections], image: MakeImage
) -> None:
    found = Predictor(small, "cpu", masks=False).predict([image(*MIXED[0])])[0]
    assert found.mask_probs is None
    assert_equal(found, replace(alone[0], mask_probs=None))


def test_max_detections_keeps_the_best(
    small: Bundle, alone: list[Detections], image: MakeImage
) -> None:
    assert len(alone[0]) == small.max_detections
    found = Predictor(small, "cpu", max_detections=7).predict([image(*MIXED[0])])[0]
    assert len(found) == 7
    assert np.array_equal(found.boxes_xyxy, alone[0].boxes_xyxy[:7])
    assert np.array_equal(found.labels, alone[0].labels[:7])


def test_score_threshold_drops_the_worst(
    small: Bundle, alone: list[Detections], image: MakeImage
) -> None:
    threshold = float(np.median(alone[0].scores))
    kept = int((alone[0].scores > threshold).sum())
    assert 0 < kept < len(alone[0])
    found = Predictor(small, "cpu", score_threshold=threshold).predict([image(*MIXED[0])])[0]
    assert np.array_equal(found.scores, alone[0].scores[:kept])
    assert np.array_equal(found.boxes_xyxy, alone[0].boxes_xyxy[:kept])


def test_a_threshold_of_zero_is_not_the_bundles(small: Bundle, image: MakeImage) -> None:
    strict = replace(small, score_threshold=1.0, digest="")
    assert len(Predictor(strict, "cpu").predict([image(64, 64)])[0]) == 0
    assert len(Predictor(strict, "cpu", score_threshold=0).predict([image(64, 64)])[0]) > 0


def test_auto_precision_on_cpus_is_fast(
    small: Bundle, alone: list[Detections], image: MakeImage
) -> None:
    found = Predictor(small, "cpu", "fp32-fast").predict([image(*MIXED[0])])[0]
    assert_equal(found, alone[0])


def matched(found: Detections, expected: Detections) -> float:
    """Return the share of `expected` that `found` has too: same label, IoU over 0.5, score within 0.1."""
    ious = box_iou(
        torch.from_numpy(expected.boxes_xyxy), torch.from_numpy(found.boxes_xyxy)
    ).numpy()
    same = expected.labels[:, None] == found.labels
    near = np.abs(expected.scores[:, None] - found.scores) < 0.1
    return float((same & near & (ious > 0.5)).any(axis=1).mean())


@pytest.mark.parametrize("arch", get_args(Architecture))
def test_fast_is_fp32_but_for_roundings(
    lively: MakeBundle, image: MakeImage, arch: Architecture
) -> None:
    bundle = lively(arch, 4, 64, 96)
    fast, exact = Predictor(bundle, "cpu", "fp32-fast"), Predictor(bundle, "cpu", "fp32")
    modules = list(fast.model.modules())
    assert not any(isinstance(m, torch.nn.BatchNorm2d | FrozenBatchNorm2d) for m in modules)
    assert any(isinstance(module, WinogradConv2d) for module in modules)
    for size in MIXED[:2]:
        found, expected = (one.predict([image(*size)])[0] for one in (fast, exact))
        assert len(found) == len(expected) == bundle.max_detections
        assert share_kept(found, expected) >= 0.9


def test_what_is_compiled_finds_the_same_with_a_few_programs_for_all_sizes(
    small: Bundle, image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a backend of torch's that traces and takes apart what inductor would make programs of: that takes minutes."""
    whole = torch.nn.Module.compile
    traced = partialmethod(whole, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = Predictor(small, "cpu", "fp32-fast", compiled=True, batch_size=4)
    plain = Predictor(small, "cpu", "fp32-fast", batch_size=4)
    images = [image(*size) for size in [*MIXED, (40, 64), (64, 40), (90, 120)]]
    found = compiled.predict(images)
    shares = [share_kept(*pair) for pair in zip(found, plain.predict(images), strict=True)]
    assert np.mean(shares) >= 0.9
    stats = torch._dynamo.utils.counters["stats"]
    # One of each part for several, and one for a single image or box, where torch knows more.
    assert 5 <= stats["unique_graphs"] <= 15
    # Other images, other numbers of boxes, other batches: no new program.
    before = stats["unique_graphs"]
    compiled.predict(images[::-1][:5])
    assert stats["unique_graphs"] == before
    assert not torch._dynamo.utils.counters["unimplemented"]


def test_compiling_takes_a_compiler_and_rounds(
    small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="choose the precision fp32-fast"):
        Predictor(small, "cpu", "fp32", compiled=True)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"install g\+\+"):
        Predictor(small, "cpu", "bf16", compiled=True)


@pytest.mark.parametrize(("precision", "share"), [("bf16", 0.5), ("fp16", 0.9)])
def test_half_precision_is_close(
    small: Bundle,
    alone: list[Detections],
    image: MakeImage,
    precision: Precision,
    share: float,
) -> None:
    """Most detections survive: of random weights, which amplify roundings, 76 % and 98 % here.

    Features move by 12 % (bf16, 8 bits) and 1.5 % (fp16, 11 bits) of their norm.
    """
    predictor = Predictor(small, "cpu", precision, max_detections=100)
    found = predictor.predict([image(*size) for size in MIXED[:3]])
    shares = [matched(one, expected) for one, expected in zip(found, alone, strict=False)]
    assert np.mean(shares) >= share
    assert not np.array_equal(found[0].boxes_xyxy[:30], alone[0].boxes_xyxy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "unknown precision 'fp8': use auto, fp32, fp32-fast, bf16, fp16"),
        ({"batch_size": 0}, r"batch_size \(0\) and max_detections \(30\) must be 1 or more"),
        ({"max_detections": 0}, r"max_detections \(0\) must be 1 or more"),
    ],
)
def test_refuses_what_it_cannot_do(small: Bundle, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(small, "cpu", **options)


@pytest.mark.parametrize(
    "no_image",
    [
        np.zeros((5, 5), np.uint8),
        np.zeros((5, 5, 4), np.uint8),
        np.zeros((3, 5, 5), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((5, 5, 3), np.float32),
    ],
    ids=["grey", "rgba", "channels first", "empty", "float"],
)
def test_refuses_what_is_no_image(predictor: Predictor, no_image: Any) -> None:
    with pytest.raises(ValueError, match=r"an image must be \(H, W, 3\) uint8, not"):
        predictor.predict([no_image])


def test_memory_layout_does_not_matter(predictor: Predictor, image: MakeImage) -> None:
    plain = image(40, 50)
    expected = predictor.predict([plain])[0]
    read_only = plain.copy()
    read_only.flags.writeable = False
    flipped = np.ascontiguousarray(plain[::-1, ::-1])[::-1, ::-1]
    transposed = np.ascontiguousarray(plain.transpose(1, 0, 2)).transpose(1, 0, 2)
    for found in predictor.predict([read_only, flipped, transposed]):
        assert_equal(found, expected)


@pytest.mark.parametrize("size", [(40, 50), (1, 1)])
def test_images_stay_as_they_are(
    predictor: Predictor, image: MakeImage, size: tuple[int, int]
) -> None:
    pixels = image(*size)
    predictor.predict([pixels])
    assert np.array_equal(pixels, image(*size))


def test_the_callers_random_numbers_stay_as_they_are(small: Bundle) -> None:
    before = torch.random.get_rng_state()
    Predictor(small, "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_device_auto_is_the_cpu_where_there_is_no_gpu(
    small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Predictor(small).device == torch.device("cpu")


@pytest.fixture
def with_room_for(
    small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int, int], tuple[Predictor, list[int]]]:
    """`with_room_for(batch_size, pixels)`: a predictor whose device is small, and the batches that it tries."""

    def make(batch_size: int, pixels: int) -> tuple[Predictor, list[int]]:
        predictor = Predictor(small, "cpu", batch_size=batch_size)
        tried: list[int] = []
        whole = predictor._predict_batch

        def run(images: list[Picture], *, beside: bool) -> list[Detections]:
            tried.append(len(images))
            # What lies there of another batch takes half of it.
            room = pixels // 2 if beside else pixels
            if sum(image.size_hw[0] * image.size_hw[1] for image in images) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(images, beside=beside)

        monkeypatch.setattr(predictor, "_predict_batch", run)
        return predictor, tried

    return make


def test_a_batch_that_does_not_fit_is_halved_and_stays_so(
    with_room_for: Callable[..., tuple[Predictor, list[int]]], image: MakeImage
) -> None:
    predictor, tried = with_room_for(8, 3 * 64 * 64)
    found = predictor.predict([image(64, 64) for _ in range(16)])
    assert tried == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert all(len(one) == len(found[0]) > 0 for one in found)
    tried.clear()
    through: list[int] = []
    predictor.on_batch = through.append
    predictor.predict([image(64, 64) for _ in range(5)])
    assert through == tried == [2, 2, 1]


def test_a_batch_that_does_not_fit_beside_another_is_tried_alone(
    with_room_for: Callable[..., tuple[Predictor, list[int]]], image: MakeImage
) -> None:
    predictor, tried = with_room_for(4, 3 * 64 * 64)
    predictor._ahead = True
    found = predictor.predict([image(64, 64) for _ in range(3)])
    assert tried == [3, 3]
    assert len(found) == 3
    tried.clear()
    predictor.predict([image(64, 64) for _ in range(5)])
    # Four fit in no way; of two, one beside another would.
    assert tried == [4, 4, 2, 2, 2, 2, 1]


def test_another_shape_keeps_its_batch_size(
    with_room_for: Callable[..., tuple[Predictor, list[int]]], image: MakeImage
) -> None:
    predictor, tried = with_room_for(4, 3 * 64 * 64)
    wide = [image(24, 48) for _ in range(4)]
    predictor.predict([image(64, 64) for _ in range(4)])
    tried.clear()
    assert len(predictor.predict(wide)) == 4
    assert tried == [4]


def test_an_image_that_does_not_fit_alone_is_refused_and_its_mates_are_not(
    with_room_for: Callable[..., tuple[Predictor, list[int]]], image: MakeImage
) -> None:
    predictor, _ = with_room_for(4, 64 * 64)
    # Of one padded size: the network sees both as 64 x 64.
    images = [image(64, 64), image(96, 96), image(60, 60), image(96, 96)]
    refused: dict[int, str] = {}
    found = dict(predictor.stream(enumerate(images), refused.__setitem__))
    assert found.keys() == {0, 2}
    assert refused == dict.fromkeys((1, 3), "memory: 96 x 96 pixels do not fit the device")
    with pytest.raises(torch.OutOfMemoryError, match="96 x 96 pixels do not fit the device"):
        predictor.predict(images)
