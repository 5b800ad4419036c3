"""Images to boxes, scores and small mask probabilities. Full-size masks are made nowhere here."""

import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import resize_boxes

from segmodel.batching import batches
from segmodel.bundle import Bundle
from segmodel.model import mask_rcnn
from segmodel.schema import Detections
from segmodel.settings import Precision, network_size

Image = npt.NDArray[np.uint8]

# The feature pyramid halves five times, so both sides are padded to a multiple of 32, as
# torchvision does for an image that comes alone.
SIZE_DIVISOR = 32
# On a GPU, kernels of one image are too small to fill it; on a CPU a batch only costs cache.
GPU_BATCH_SIZE = 8
CPU_BATCH_SIZE = 1
# Decoded images that may wait for others of their shape, in batches.
LOOK_AHEAD_BATCHES = 4

_AUTOCAST = {"auto": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Predictor:
    """Mask R-CNN with its weights on one device.

    Results depend on the image, the bundle, the precision and the thresholds, never on what else is
    predicted: an image is padded to a size of its own, and only images of that size share a batch.
    Safe to use from several threads; one batch is in the network at a time.
    """

    def __init__(  # noqa: PLR0913 - the contract of the design names them one by one
        self,
        bundle: Bundle,
        device: str = "auto",
        precision: Precision = "auto",
        *,
        score_threshold: float | None = None,
        max_detections: int | None = None,
        batch_size: int | None = None,
        masks: bool = True,
    ) -> None:
        """Build the network and load the weights.

        Args:
            bundle: The model.
            device: `auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, ...
            precision: Arithmetic of the backbone and feature pyramid; heads, RoIAlign and
                non-maximum suppression are always fp32. `auto` is fp32: no other has been proved
                yet.
            score_threshold: Drop what scores lower; the bundle's where None.
            max_detections: For each image, best first; the bundle's where None.
            batch_size: Images in a batch; where None, 8 on a GPU and 1 on a CPU.
            masks: False leaves the mask head out: boxes only.

        Raises:
            ValueError: `precision` is unknown, or a number out of its range.
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
        if precision not in _AUTOCAST:
            raise ValueError(f"unknown precision {precision!r}: use {', '.join(_AUTOCAST)}")
        self.batch_size = batch_size
        self.settings = bundle.settings
        self.autocast_dtype = _AUTOCAST[precision]
        self._lock = threading.Lock()

        # The random weights, which are replaced at once, are not to disturb the caller's generator.
        with torch.random.fork_rng(devices=[]):
            model = mask_rcnn(bundle.settings)
        model.load_state_dict(dict(bundle.weights))
        heads = model.roi_heads
        heads.score_thresh = bundle.score_threshold if score_threshold is None else score_threshold
        heads.detections_per_img = max_detections
        if not masks:
            heads.mask_roi_pool = None
        self.model = model.eval().requires_grad_(requires_grad=False).to(self.device)
        as_channels = torch.tensor([bundle.settings.image_mean, bundle.settings.image_std])
        self._mean, self._std = as_channels.to(self.device)[:, :, None, None]

    def predict(self, images: Sequence[Image]) -> list[Detections]:
        """Segment images.

        Args:
            images: Each (H, W, 3) uint8 RGB, upright, as `images.decode` gives them.

        Returns:
            One `Detections` for each image, in their order.

        Raises:
            ValueError: An image is none.
        """
        found = dict(self.stream(enumerate(images)))
        return [found[index] for index in range(len(images))]

    def stream(self, images: Iterable[tuple[int, Image]]) -> Iterator[tuple[int, Detections]]:
        """Segment numbered images as they come, holding only a few batches of them.

        Args:
            images: Number and image, taken only as fast as the network goes.

        Yields:
            Number and detections, in the order in which batches fill.

        Raises:
            ValueError: An image is none.
        """
        look_ahead = self.batch_size * LOOK_AHEAD_BATCHES if self.batch_size > 1 else 1
        for group in batches(
            images, lambda item: self._padded_size(item[1]), self.batch_size, look_ahead
        ):
            yield from zip(
                (number for number, _ in group),
                self._predict_batch([image for _, image in group]),
                strict=True,
            )

    def _padded_size(self, image: Image) -> tuple[int, int]:
        _check(image)
        height, width = network_size(self.settings, image.shape[:2])
        return _round_up(height), _round_up(width)

    def _predict_batch(self, images: list[Image]) -> list[Detections]:
        """Run the network on images of one padded size."""
        with self._lock, torch.inference_mode():
            batch = self._to_batch(images)
            with torch.autocast(
                self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None
            ):
                features = self.model.backbone(batch.tensors)
            features = {name: feature.float() for name, feature in features.items()}
            proposals, _ = self.model.rpn(batch, features)
            found, _ = self.model.roi_heads(features, proposals, batch.image_sizes)
            return [
                _to_detections(one, image.shape[:2], size_hw)
                for one, image, size_hw in zip(found, images, batch.image_sizes, strict=True)
            ]

    def _to_batch(self, images: list[Image]) -> ImageList:
        """Scale to 0..1, normalise, resize, pad: `GeneralizedRCNNTransform`, for one padded size."""
        padded = torch.zeros((len(images), 3, *self._padded_size(images[0])), device=self.device)
        sizes = []
        for row, image in zip(padded, images, strict=True):
            height, width = network_size(self.settings, image.shape[:2])
            # torch refuses negative strides and warns of read-only memory: only those are copied.
            pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).to(self.device)
            # One float copy of the image and no more: it may have 89 megapixels.
            normalised = pixels.permute(2, 0, 1).contiguous().float()
            normalised.div_(255).sub_(self._mean).div_(self._std)
            row[:, :height, :width] = functional.interpolate(
                normalised[None], size=(height, width), mode="bilinear", align_corners=False
            )[0]
            sizes.append((height, width))
        return ImageList(padded, sizes)


def _check(image: Image) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype != np.uint8:
        raise ValueError(
            f"an image must be (H, W, 3) uint8, not {image.shape} {image.dtype}: see `images.decode`"
        )


def _round_up(pixels: int) -> int:
    return -(-pixels // SIZE_DIVISOR) * SIZE_DIVISOR


def _to_detections(
    found: dict[str, Tensor], original_hw: tuple[int, int], network_hw: tuple[int, int]
) -> Detections:
    boxes = resize_boxes(found["boxes"], network_hw, original_hw)
    masks = found.get("masks")
    return Detections(
        boxes_xyxy=boxes.float().cpu().numpy(),
        scores=found["scores"].float().cpu().numpy(),
        labels=found["labels"].cpu().numpy(),
        mask_probs=None if masks is None else masks[:, 0].float().cpu().numpy(),
        size_hw=original_hw,
    )
