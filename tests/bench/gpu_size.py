"""How much the accelerator's benchmark does."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much to do: enough to be steady on a GPU, or just to see that it runs.

    Attributes:
        min_size, max_size: Of the network's input.
        shrink: Divides the sides of photos.
        photos: How many, of each kind but the large ones.
        large: How many of 12 megapixels.
        scenes: How many show what a precision costs.
        rounds: How often a turn of ours goes over the photos; plain torchvision goes once.
        turns: How often each is timed.
        batch: Images in a batch.
        train_batch: Images in a step of training.
        warm_up_steps, steps: Of training; the first are not counted.
    """

    min_size: int
    max_size: int
    shrink: int
    photos: int
    large: int
    scenes: int
    rounds: int
    turns: int
    batch: int
    train_batch: int
    warm_up_steps: int
    steps: int


GPU = Size(
    min_size=800,
    max_size=1333,
    shrink=1,
    photos=64,
    large=8,
    scenes=40,
    rounds=16,
    turns=3,
    batch=16,
    train_batch=16,
    warm_up_steps=3,
    steps=20,
)
TOY = Size(
    min_size=32,
    max_size=54,
    shrink=16,
    photos=2,
    large=2,
    scenes=2,
    rounds=1,
    turns=3,
    batch=2,
    train_batch=2,
    warm_up_steps=1,
    steps=1,
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where to measure, what to call it, and how much."""

    device: torch.device
    hardware: str
    size: Size


def here() -> Place:
    """Return the first GPU, or this CPU with toy sizes."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return Place(device=torch.device("cuda"), hardware=name, size=GPU)
    return Place(device=torch.device("cpu"), hardware="CPU, toy sizes", size=TOY)


def peak_mib(device: torch.device) -> float | None:
    """Return the accelerator's memory at its peak since the last call."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 2**20
    torch.cuda.reset_peak_memory_stats(device)
    return peak
