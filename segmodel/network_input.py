"""Photos to the network's input: scaled to 0..1, normalised, resized and padded.

That is torchvision's `GeneralizedRCNNTransform`, of photos of one padded size. On a CPU it is done there, to
the bit (`resize`). To a GPU go the bytes of the photo, and torch's own kernels do the rest.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.image_list import ImageList

from segmodel.images import Picture
from segmodel.resize import Resizer
from segmodel.settings import ModelSettings, network_size

# The feature pyramid halves five times, so both sides are padded to a multiple of 32, as
# torchvision does for an image that comes alone.
SIZE_DIVISOR = 32


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Input of the network, perhaps still being written.

    Attributes:
        tensors: (N, 3, H, W) float32.
        sizes_hw: What of each is not padding.
        written: On a GPU, when it is.
    """

    tensors: Tensor
    sizes_hw: list[tuple[int, int]]
    written: torch.cuda.Event | None = None

    def when_written(self) -> ImageList:
        """Return the images, for whatever the calling thread does with them on the device from now on."""
        if self.written is not None:
            stream = torch.cuda.current_stream(self.tensors.device)
            stream.wait_event(self.written)
            # Else its memory could be given to the next batch while it is read.
            self.tensors.record_stream(stream)
        return ImageList(self.tensors, self.sizes_hw)


class NetworkInput(Protocol):
    """Makes batches of photos of one padded size."""

    def batch(self, images: Sequence[Picture]) -> Batch:
        """Return them as the network takes them."""
        ...


class HostInput:
    """Makes batches on a CPU."""

    def __init__(self, settings: ModelSettings, layout: torch.memory_format) -> None:
        self._settings, self._layout = settings, layout
        self._resizer = Resizer(settings.image_mean, settings.image_std)

    def batch(self, images: Sequence[Picture]) -> Batch:
        """Return the network's input, torchvision's to the bit."""
        padded, sizes = _padding(images, self._settings, torch.device("cpu"), self._layout)
        for row, image, (height, width) in zip(padded, images, sizes, strict=True):
            self._resizer.write(image.pixels, row[:, :height, :width])
        return Batch(tensors=padded, sizes_hw=sizes)


class DeviceInput:
    """Makes batches on a device to which photos are uploaded.

    On a GPU it only queues the work, on a stream beside that of the network. The network's input there may
    be read after `Batch.when_written`.
    """

    def __init__(
        self, settings: ModelSettings, device: torch.device, layout: torch.memory_format
    ) -> None:
        self._settings, self._device, self._layout = settings, device, layout
        as_channels = torch.tensor([settings.image_mean, settings.image_std])
        self._mean, self._std = as_channels.to(device)[:, :, None, None]
        self._stream = _beside(device) if device.type == "cuda" else None

    def batch(self, images: Sequence[Picture]) -> Batch:
        """Return the network's input, torchvision's but for roundings."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            padded, sizes = _padding(images, self._settings, self._device, self._layout)
            for row, image, (height, width) in zip(padded, images, sizes, strict=True):
                self._write(image.pixels, row[:, :height, :width])
            written = None if self._stream is None else self._stream.record_event()
        return Batch(tensors=padded, sizes_hw=sizes, written=written)

    def _write(self, pixels: npt.NDArray[np.uint8], row: Tensor) -> None:
        """Normalise and resize pixels (H, W, 3) into row (3, h, w)."""
        uploaded = staged(pixels, self._device).to(self._device, non_blocking=True)
        # One float copy of the image and no more: it may have 89 megapixels.
        normalised = uploaded.permute(2, 0, 1).contiguous().float()
        normalised.div_(255).sub_(self._mean).div_(self._std)
        row.copy_(
            functional.interpolate(
                normalised[None], size=row.shape[1:], mode="bilinear", align_corners=False
            )[0]
        )


def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def staged(pixels: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    """Copy pixels of any strides to where a device gets them without waiting: for a GPU, pinned memory.

    torch reuses that memory, but not before the uploads from it are done.
    """
    copied = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.copyto(copied.numpy(), pixels)
    return copied


def padded_size(settings: ModelSettings, size_hw: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of the network's input for an image that comes alone."""
    height, width = network_size(settings, size_hw)
    return _round_up(height), _round_up(width)


def _round_up(pixels: int) -> int:
    return -(-pixels // SIZE_DIVISOR) * SIZE_DIVISOR


def _padding(
    images: Sequence[Picture],
    settings: ModelSettings,
    device: torch.device,
    layout: torch.memory_format,
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return an input of zeros for images of one padded size, and what each is to cover of it."""
    shape = (len(images), 3, *padded_size(settings, images[0].size_hw))
    padded = torch.empty(shape, device=device, memory_format=layout).zero_()
    return padded, [network_size(settings, image.size_hw) for image in images]
