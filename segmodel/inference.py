"""Images to boxes, scores and small mask probabilities. Full-size masks are made nowhere here."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.transform import resize_boxes

from segmodel.batching import batches
from segmodel.bundle import Bundle
from segmodel.images import Picture
from segmodel.lowering import keep_exact, lower
from segmodel.model import mask_rcnn
from segmodel.network_input import Batch, DeviceInput, HostInput, NetworkInput, padded_size
from segmodel.schema import Detections
from segmodel.settings import InferencePrecision, resolved
from segmodel.turns import Turns

Image = npt.NDArray[np.uint8]
_Numbered = tuple[int, Picture]

# On a GPU, kernels of one image are too small to fill it; on a CPU a batch only costs cache.
GPU_BATCH_SIZE = 8
CPU_BATCH_SIZE = 1
# Decoded images that may wait for others of their shape: on a CPU in batches, on a GPU in bytes, of each
# stream. For a network of 800 x 1333, a hundred of COCO's photos have 25 shapes: in chunks of 256 photos
# drawn from them, a batch of 8 holds 3.8 images on average where four batches may wait, and 5.7 so. A chunk
# of such photos has 0.2 GiB, and waits as a whole.
LOOK_AHEAD_BATCHES = 4
LOOK_AHEAD_BYTES = 2**30

_DTYPES = {
    "fp32": torch.float32,
    "fp32-fast": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class _Found(NamedTuple):
    """What the network found in a batch: a tensor for each image, and the masks of all in their order."""

    boxes: list[Tensor]
    scores: list[Tensor]
    labels: list[Tensor]
    masks: Tensor | None


class Predictor:
    """Mask R-CNN with its weights on one device.

    Results depend on the image, the bundle, the precision and the thresholds, never on what else is
    predicted: an image is padded to a size of its own, and only images of that size share a batch.
    Safe to use from several threads: one batch is in the network at a time, and on a GPU another one is
    uploaded and resized meanwhile.
    """

    def __init__(  # noqa: PLR0913 - the contract of the design names them one by one
        self,
        bundle: Bundle,
        device: str = "auto",
        precision: InferencePrecision = "auto",
        *,
        score_threshold: float | None = None,
        max_detections: int | None = None,
        batch_size: int | None = None,
        masks: bool = True,
        compiled: bool = False,
    ) -> None:
        """Build the network and load the weights.

        Args:
            bundle: The model.
            device: `auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, ...
            precision: `fp32` is torchvision's arithmetic to the bit. `fp32-fast` folds BatchNorm and has
                other convolutions, which rounds otherwise. `bf16` and `fp16` are of convolutions and the
                heads' large layers; RoIAlign, the last layers of the box head and non-maximum suppression are
                always fp32. For `auto` see `settings.resolved`.
            score_threshold: Drop what scores lower; the bundle's where None.
            max_detections: For each image, best first; the bundle's where None.
            batch_size: Images in a batch; where None, 8 on a GPU and 1 on a CPU.
            masks: False leaves the mask head out: boxes only.
            compiled: Have `torch.compile` make programs of the network's parts, for all sizes, with the first
                images: that takes a minute or more, and rounds otherwise.

        Raises:
            ValueError: `precision` is unknown or not to be compiled, a number is out of its range, or
                there is no compiler.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if batch_size is None:
            batch_size = GPU_BATCH_SIZE if self.device.type == "cuda" else CPU_BATCH_SIZE
        if max_detections is None:
            max_detections = bundle.max_detections
        if batch_size < 1 or max_detections < 1:
            raise ValueError(
                f"batch_size ({batch_size}) and max_detections ({max_detections}) must be 1 or more"
            )
        self.precision = resolved(precision, self.device.type, bundle.settings.arch)
        if compiled:
            _refuse_to_compile(self.precision)
        self.compiled = compiled
        self.batch_size = batch_size
        self.settings = bundle.settings
        self.masks = masks
        # Called with the number of images in each batch that came through the network.
        self.on_batch: Callable[[int], None] | None = None
        # A GPU has memory of its own, and photos are uploaded and resized beside the network. On a CPU that
        # would only take threads from it.
        self._ahead = self.device.type != "cpu"
        self._turns = Turns()
        self.busy = self._turns.busy
        # Images of a padded size that fit the device together, where they are fewer than a batch.
        self._fitting: dict[tuple[int, int], int] = {}

        self.model = self._network(bundle)
        heads = self.model.roi_heads
        heads.score_thresh = bundle.score_threshold if score_threshold is None else score_threshold
        heads.detections_per_img = max_detections
        self._input = self._network_input()

    def _network_input(self) -> NetworkInput:
        layout = torch.contiguous_format if self.precision == "fp32" else torch.channels_last
        if self.device.type == "cpu":
            return HostInput(self.settings, layout)
        return DeviceInput(self.settings, self.device, layout)

    def _network(self, bundle: Bundle) -> MaskRCNN:
        # The random weights, which are replaced at once, are not to disturb the caller's generator.
        with torch.random.fork_rng(devices=[]):
            model = mask_rcnn(bundle.settings)
        model.load_state_dict(dict(bundle.weights))
        model.eval().requires_grad_(requires_grad=False)
        if self.precision == "fp32":
            keep_exact(model, self.device)
        else:
            lower(model, _DTYPES[self.precision], self.device, compiled=self.compiled)
        return model.to(self.device)

    def predict(self, images: Sequence[Image | Picture]) -> list[Detections]:
        """Segment images.

        Args:
            images: Each (H, W, 3) uint8 RGB, upright, as `images.decode` gives them; or, as
                `images.decode_reduced` does, with fewer pixels than their file has, whose size
                then counts for the network's input, boxes and masks.

        Returns:
            One `Detections` for each image, in their order.

        Raises:
            ValueError: An image is none.
            torch.OutOfMemoryError: An image alone does not fit the device.
        """
        found = dict(self.stream(enumerate(images)))
        return [found[index] for index in range(len(images))]

    def stream(
        self,
        images: Iterable[tuple[int, Image | Picture]],
        refuse: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, Detections]]:
        """Segment numbered images as they come, holding only as many as look-ahead allows.

        Where the device has no memory for a batch, its half is tried, and batches of that shape stay
        at the size that fits.

        Args:
            images: Number and image, taken only as fast as the network goes.
            refuse: Called with number and reason, `memory: ...`, for an image that does not even fit
                alone.

        Yields:
            Number and detections, in the order in which batches fill.

        Raises:
            ValueError: An image is none.
            torch.OutOfMemoryError: An image alone does not fit, and there is no `refuse`.
        """
        pictures = ((number, _as_picture(image)) for number, image in images)
        for group in self._batches(pictures):
            yield from self._predict_group(group, refuse)

    def _batches(self, pictures: Iterable[_Numbered]) -> Iterator[list[_Numbered]]:
        """Group images of one padded size."""
        grouped = partial(
            batches, pictures, lambda item: self._padded_size(item[1]), self.batch_size
        )
        if not self._ahead:
            return grouped(self.batch_size * LOOK_AHEAD_BATCHES)
        return grouped(LOOK_AHEAD_BYTES, lambda item: item[1].pixels.nbytes)

    def _predict_group(
        self, group: list[_Numbered], refuse: Callable[[int, str], None] | None
    ) -> Iterator[tuple[int, Detections]]:
        """Segment images of one padded size, as many at a time as fit the device."""
        size = self._padded_size(group[0][1])
        start = 0
        while start < len(group):
            part = group[start : start + self._fitting.get(size, self.batch_size)]
            found = self._try_batch([image for _, image in part])
            if found is None and len(part) > 1:
                self._fitting[size] = len(part) // 2
                continue
            start += len(part)
            if found is not None:
                yield from zip((number for number, _ in part), found, strict=True)
                continue
            number, image = part[0]
            why = "memory: {} x {} pixels do not fit the device".format(*image.size_hw)
            if refuse is None:
                raise torch.OutOfMemoryError(why)
            refuse(number, why)

    def _try_batch(self, images: list[Picture]) -> list[Detections] | None:
        """Run the network; return None where the device has no memory for it."""
        # Beside another batch there may be too little where alone there is enough.
        for beside in [True, False] if self._ahead else [False]:
            with suppress(torch.OutOfMemoryError):
                found = self._predict_batch(images, beside=beside)
                if self.on_batch is not None:
                    self.on_batch(len(images))
                return found
            # Only here is the traceback gone that held the batch.
            torch.cuda.empty_cache()
        return None

    def _padded_size(self, image: Picture) -> tuple[int, int]:
        return padded_size(self.settings, image.size_hw)

    def _predict_batch(self, images: list[Picture], *, beside: bool = False) -> list[Detections]:
        """Run the network on images of one padded size, perhaps uploading them beside another batch."""
        take = self._turns.ahead if beside else self._turns.alone
        with torch.inference_mode():
            return take(lambda: self._input.batch(images), partial(self._run, images))

    def _run(self, images: list[Picture], batch: Batch) -> list[Detections]:
        inputs = batch.when_written()
        features = self.model.backbone(inputs.tensors.to(_DTYPES[self.precision]))
        features = {name: feature.float() for name, feature in features.items()}
        proposals, _ = self.model.rpn(inputs, features)
        return _to_detections(
            self._detect(features, proposals, inputs.image_sizes), images, inputs.image_sizes
        )

    def _detect(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        sizes: list[tuple[int, int]],
    ) -> _Found:
        """Do what `RoIHeads` does, with the masks (N, M, M) of one class for each box."""
        heads = self.model.roi_heads
        hidden = heads.box_head(heads.box_roi_pool(features, proposals, sizes))
        boxes, scores, labels = heads.postprocess_detections(
            *heads.box_predictor(hidden), proposals, sizes
        )
        masks = None
        if self.masks:
            hidden = heads.mask_head(heads.mask_roi_pool(features, boxes, sizes))
            masks = heads.mask_predictor(hidden, torch.cat(labels)).sigmoid()
        return _Found(boxes, scores, labels, masks)


def _refuse_to_compile(precision: InferencePrecision) -> None:
    if precision == "fp32":
        raise ValueError(
            "fp32 is torchvision's to the bit, and what is compiled rounds otherwise: "
            "choose the precision fp32-fast, bf16 or fp16, or do not compile"
        )
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    if not any(shutil.which(name) for name in compilers if name):
        raise ValueError(
            "to compile the network takes a C++ compiler: install g++, or do not compile"
        )


def _as_picture(image: Image | Picture) -> Picture:
    if isinstance(image, Picture):
        return image
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype != np.uint8:
        raise ValueError(
            f"an image must be (H, W, 3) uint8, not {image.shape} {image.dtype}: see `images.decode`"
        )
    return Picture(image, (image.shape[0], image.shape[1]))


def _to_detections(
    found: _Found, images: Sequence[Picture], sizes_hw: Sequence[tuple[int, int]]
) -> list[Detections]:
    """Bring a batch's results to the host, all boxes at once, all scores, ..., and part them there."""
    counts = [len(boxes) for boxes in found.boxes]
    boxes, scores, labels = (
        torch.split(torch.cat(some).cpu(), counts)
        for some in (found.boxes, found.scores, found.labels)
    )
    masks = None if found.masks is None else torch.split(found.masks.float().cpu(), counts)
    return [
        Detections(
            boxes_xyxy=resize_boxes(boxes[n], network_hw, image.size_hw).numpy(),
            scores=scores[n].numpy(),
            labels=labels[n].numpy(),
            mask_probs=None if masks is None else masks[n].numpy(),
            size_hw=image.size_hw,
        )
        for n, (image, network_hw) in enumerate(zip(images, sizes_hw, strict=True))
    ]
