"""The network's input as it is made on a device against that of a CPU, which `test_resize.py` proves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from segmodel import network_input
from segmodel.images import Picture
from segmodel.network_input import DeviceInput, HostInput, padded_size, staged
from segmodel.settings import ModelSettings, network_size

SETTINGS = ModelSettings(arch="small", num_classes=3, min_size=80, max_size=160)
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
CPU = torch.device("cpu")
# The network takes all of them as 96 x 128.
SIZES = [(90, 120), (61, 80), (333, 480), (80, 110)]


def photos(sizes: list[tuple[int, int]]) -> list[Picture]:
    rng = np.random.default_rng(0)
    return [Picture(rng.integers(0, 256, (*size, 3), np.uint8), size) for size in sizes]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sizes", [SIZES, [(1, 1)], [(1, 900)], [(700, 3)]])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_a_device_makes_what_the_cpu_makes(
    device: str, sizes: list[tuple[int, int]], layout: torch.memory_format
) -> None:
    images = photos(sizes)
    there = DeviceInput(SETTINGS, torch.device(device), layout).batch(images)
    inputs, expected = there.when_written(), HostInput(SETTINGS, layout).batch(images)
    assert inputs.image_sizes == expected.sizes_hw == [network_size(SETTINGS, s) for s in sizes]
    assert inputs.tensors.shape == (len(sizes), 3, *padded_size(SETTINGS, sizes[0]))
    assert inputs.tensors.is_contiguous(memory_format=layout)
    found = inputs.tensors.cpu()
    assert (found - expected.tensors).abs().max() <= 1e-4
    for row, (height, width) in zip(found, inputs.image_sizes, strict=True):
        assert (row[:, height:] == 0).all()
        assert (row[:, :, width:] == 0).all()


def test_pictures_with_fewer_pixels_than_their_files_are_scaled_likewise() -> None:
    (whole,) = photos([(90, 120)])
    images = [Picture(whole.pixels, (360, 480)), whole]
    found, expected = (
        make.batch(images)
        for make in (
            DeviceInput(SETTINGS, CPU, torch.channels_last),
            HostInput(SETTINGS, torch.channels_last),
        )
    )
    assert (found.tensors - expected.tensors).abs().max() <= 1e-4
    assert torch.equal(found.tensors[0], found.tensors[1])


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True), ("cuda:1", True)])
def test_memory_is_pinned_for_gpus_only(
    monkeypatch: pytest.MonkeyPatch, device: str, pinned: bool
) -> None:
    asked: list[bool] = []
    empty = torch.empty

    def watched(*shape: Any, pin_memory: bool, **options: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(network_input.torch, "empty", watched)
    (photo,) = photos([(7, 9)])
    assert np.array_equal(staged(photo.pixels, torch.device(device)).numpy(), photo.pixels)
    assert asked == [pinned]


def test_memory_of_any_strides_is_staged_and_stays_as_it_is() -> None:
    (photo,) = photos([(7, 9)])
    read_only = photo.pixels.copy()
    read_only.flags.writeable = False
    for pixels in (read_only, photo.pixels[::-1, ::-1], photo.pixels.transpose(1, 0, 2)):
        copied = staged(pixels, CPU)
        assert copied.is_contiguous()
        assert np.array_equal(copied.numpy(), pixels)
        copied.zero_()
        assert pixels.any()


def test_on_a_gpu_the_work_is_queued_beside_the_network_which_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With streams that only write down in which order they are asked."""
    calls: list[str] = []

    class Stream:
        def record_event(self) -> str:
            calls.append("record")
            return "written"

        def wait_event(self, event: str) -> None:
            calls.append(f"wait for {event}")

    @contextmanager
    def beside(_stream: Stream) -> Iterator[None]:
        calls.append("leave the network's")
        yield
        calls.append("go back")

    whole = functional.interpolate

    def resize(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append("resize")
        return whole(*arguments, **options)

    monkeypatch.setattr(torch.cuda, "stream", beside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Stream())
    monkeypatch.setattr(functional, "interpolate", resize)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda _tensor, _stream: calls.append("keep")
    )
    maker = DeviceInput(SETTINGS, CPU, torch.channels_last)
    monkeypatch.setattr(maker, "_stream", Stream())
    batch = maker.batch(photos(SIZES[:2]))
    queued = ["leave the network's", "resize", "resize", "record", "go back"]
    assert calls == queued
    assert batch.when_written().tensors is batch.tensors
    assert calls[len(queued) :] == ["wait for written", "keep"]
