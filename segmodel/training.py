"""Training: batches on the device, the optimizer step, the schedule, and the average of the weights.

`Trainer.step` is one step on one worker; where `torch.distributed` is set up, workers share it.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection.image_list import ImageList

from segmodel.bundle import Bundle
from segmodel.freezing import freeze_norm, frozen_stages
from segmodel.losses import LOSSES, LossSums, Target
from segmodel.model import mask_rcnn
from segmodel.network_input import SIZE_DIVISOR
from segmodel.settings import MaskTargets, ModelSettings, Precision
from segmodel.statistics import measure_statistics
from segmodel.targets import Sample

Norm = Literal["train", "sync", "frozen"]
OptimizerName = Literal["sgd", "adamw"]
ScheduleName = Literal["cosine", "step"]

# The batch that learning rates are quoted for; others are scaled linearly (Goyal et al.,
# https://arxiv.org/abs/1706.02677). It is that of detectron2 and of the paper.
REFERENCE_BATCH = 16
WARMUP_FACTOR = 0.001
# Of the schedule `step`: the rate falls to a tenth at these shares of all epochs, as in
# detectron2's 1x schedule (60k and 80k of 90k steps).
MILESTONES = (2 / 3, 8 / 9)
# fp16 halves its factor, 65536 at first, where a gradient overflows. Below this it is no overflow.
LEAST_FP16_SCALE = 1.0
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what to do."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: Passes over the training set.
        optimizer: `sgd` (with momentum) or `adamw`.
        learning_rate: At its peak, for a batch of `REFERENCE_BATCH` images.
        momentum: Of `sgd`.
        weight_decay: Of the weights of convolutions and linear layers; biases and normalisation have
            none.
        warmup_epochs: The rate rises linearly over these.
        schedule: `cosine` to zero, or `step`.
        clip_norm: Gradients are scaled down to this norm, 0 for not at all.
        ema_decay: Of the average of the weights at each step, 0 for no average.
        accumulate: Micro-batches of a worker in one step.
        precision: Arithmetic of backbone, pyramid and heads.
        norm: `train`: batch statistics; `sync`: those of all workers (GPUs only); `frozen`: the
            statistics and constants that the bundle brings.
        freeze_stages: Of the backbone, from the image on, that stay as they are.
        proposals_per_image: Drawn for class, box and mask loss, a quarter of them positive at most;
            the mask head's part of a step's cost grows with it.
        mask_targets: See `losses.MaskTargets`.
        seed: Of everything that is drawn.
    """

    epochs: int
    optimizer: OptimizerName = "sgd"
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_epochs: float = 0.5
    schedule: ScheduleName = "cosine"
    clip_norm: float = 10.0
    ema_decay: float = 0.999
    accumulate: int = 1
    precision: Precision = "fp32"
    norm: Norm = "train"
    freeze_stages: int = 0
    proposals_per_image: int = 512
    mask_targets: MaskTargets = "torchvision"
    seed: int = 0


def learning_rate(recipe: Recipe, epoch: float, batch_size: int) -> float:
    """Return the rate of a step.

    Args:
        recipe: The peak and the schedule.
        epoch: Epochs done so far, with their fraction.
        batch_size: Images of all workers in the step.
    """
    peak = recipe.learning_rate * batch_size / REFERENCE_BATCH
    if epoch < recipe.warmup_epochs:
        done = epoch / recipe.warmup_epochs
        return peak * (WARMUP_FACTOR + (1 - WARMUP_FACTOR) * done)
    share = epoch / recipe.epochs
    if recipe.schedule == "step":
        return peak * 0.1 ** sum(share >= milestone for milestone in MILESTONES)
    after = (epoch - recipe.warmup_epochs) / max(recipe.epochs - recipe.warmup_epochs, 1e-9)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, after)))


def to_device(
    samples: Sequence[Sample], settings: ModelSettings, device: torch.device
) -> tuple[ImageList, list[Target]]:
    """Bring samples to the device as bytes and normalise, pad and unfold them there.

    Images are not scaled: augmentation has done it.
    """
    mean, std = (
        torch.tensor(values, device=device)[:, None, None]
        for values in (settings.image_mean, settings.image_std)
    )
    sizes = [sample.image.shape[:2] for sample in samples]
    height, width = (
        -(-max(size[axis] for size in sizes) // SIZE_DIVISOR) * SIZE_DIVISOR for axis in (0, 1)
    )
    padded = torch.zeros((len(samples), 3, height, width), device=device).contiguous(
        memory_format=torch.channels_last
    )
    for row, sample in zip(padded, samples, strict=True):
        pixels = _bytes_to(sample.image, device).permute(2, 0, 1).float()
        h, w = sample.image.shape[:2]
        row[:, :h, :w] = pixels.div_(255).sub_(mean).div_(std)
    return ImageList(padded, sizes), [_to_target(sample, device) for sample in samples]


def _to_target(sample: Sample, device: torch.device) -> Target:
    shapes = [crop.mask.shape for crop in sample.masks]
    flat = [crop.mask.reshape(-1) for crop in sample.masks]
    # One transfer for all masks of an image.
    all_bytes = np.concatenate(flat).view(np.uint8) if flat else np.empty(0, np.uint8)
    sizes = [h * w for h, w in shapes]
    parts = torch.split(_bytes_to(all_bytes, device), sizes) if flat else ()
    return Target(
        boxes_xyxy=torch.from_numpy(sample.boxes_xyxy).to(device),
        labels=torch.from_numpy(sample.labels).to(device),
        crops=[part.view(shape) for part, shape in zip(parts, shapes, strict=True)],
        crowds_xyxy=torch.from_numpy(sample.crowds_xyxy).to(device),
        scale=sample.scale,
    )


def _bytes_to(array: Any, device: torch.device) -> Tensor:
    # torch refuses negative strides and warns of memory that it may not write: only those are copied.
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Trainer:
    """A network under training on one device, with its optimizer and the average of its weights."""

    def __init__(self, bundle: Bundle, recipe: Recipe, device: torch.device) -> None:
        """Load the weights of `bundle`, and share gradients where `torch.distributed` is set up."""
        self.bundle, self.recipe, self.device = bundle, recipe, device
        self.num_workers = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.steps = 0
        with torch.random.fork_rng(devices=[]):
            self.model = mask_rcnn(bundle.settings)
        self.model.load_state_dict(dict(bundle.weights))
        if recipe.norm == "sync":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)  # type: ignore[no-untyped-call]
        self.model.roi_heads.fg_bg_sampler.batch_size_per_image = recipe.proposals_per_image
        self.model.to(device, memory_format=torch.channels_last).train()
        self._freeze()
        self.average = _copy(self.model.state_dict()) if recipe.ema_decay else None
        losses = LossSums(self.model, _AUTOCAST[recipe.precision], recipe.mask_targets)
        self._network: nn.Module = losses
        if self.num_workers > 1:
            # Training uses the statistics of batches; the running ones differ between workers until
            # `share_statistics` averages them.
            own = [name for name, _ in losses.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(losses, own)  # type: ignore[no-untyped-call]
            self._network = DistributedDataParallel(losses)
        self.optimizer = _optimizer(self.model, recipe)
        self._scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")

    def step(self, micro_batches: Sequence[Sequence[Sample]], epoch: float) -> dict[str, float]:
        """Do one step of the optimizer.

        Args:
            micro_batches: `recipe.accumulate` of them; other workers have as many.
            epoch: Epochs done so far, with their fraction.

        Returns:
            The losses of all workers' images by name, their sum `loss`, `learning_rate`,
            `gradient_norm` (not where fp16 overflowed, which skips the update) and `images`.

        Raises:
            TrainingError: A loss or a gradient is not finite; the message names the images. The weights
                are those of the step before.
        """
        # What is drawn in a step depends on nothing before it: a resumed run draws the same.
        seeds = (self.recipe.seed, self.steps, self.rank)
        torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1))
        totals = torch.zeros(len(LOSSES) + 1, device=self.device)
        for number, samples in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self._without_sharing():
                totals += self._backward(samples, len(micro_batches))
        *losses, images = totals.tolist()
        rate = learning_rate(self.recipe, epoch, round(images))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = self._update(micro_batches)
        self.steps += 1
        named = dict(zip(LOSSES, losses, strict=True))
        found = {"loss": sum(losses), **named, "learning_rate": rate, "images": images}
        # JSON knows no infinity.
        return found | ({"gradient_norm": norm} if math.isfinite(norm) else {})

    def _backward(self, samples: Sequence[Sample], num_micro_batches: int) -> Tensor:
        """Add the gradients of a micro-batch; return its losses and the images of all workers."""
        images, targets = to_device(samples, self.bundle.settings, self.device)
        sums, counts = self._network(images, targets)
        # Divided by the counts of all workers: the same as one worker with all images. DDP averages
        # gradients, so each worker divides by the mean.
        stats = torch.cat([sums.detach(), counts, counts.new_tensor([len(samples)])])
        if self.num_workers > 1:
            dist.all_reduce(stats)
        all_sums, all_counts, num_images = torch.split(stats, [len(LOSSES), len(LOSSES), 1])
        if not bool(all_sums.isfinite().all()):
            self._stop("the loss", [] if bool(sums.isfinite().all()) else samples)
        divisors = all_counts.clamp(min=1) * num_micro_batches
        self._scaler.scale((sums / (divisors / self.num_workers)).sum()).backward()
        return torch.cat([all_sums / divisors, num_images])

    def _update(self, micro_batches: Sequence[Sequence[Sample]]) -> float:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._scaler.unscale_(self.optimizer)
        limit = self.recipe.clip_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(parameters, limit, foreach=True))
        # The scaler of fp16 leaves such a step out, and tries a smaller factor.
        if not self._scaler.is_enabled() and not math.isfinite(norm):
            self._stop("the gradient", [sample for samples in micro_batches for sample in samples])
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if not math.isfinite(norm) and self._scaler.get_scale() < LEAST_FP16_SCALE:
            self._stop("the gradient", [sample for samples in micro_batches for sample in samples])
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            # Early on the average follows quickly, so that it forgets the first weights.
            decay = min(self.recipe.ema_decay, (1 + self.steps) / (10 + self.steps))
            _move_average(self.average, self.model.state_dict(), decay)
        return norm

    def _stop(self, what: str, suspects: Sequence[Sample]) -> None:
        """Raise the error about what is not finite, with the suspects of all workers; all must call it."""
        mine = [sample.image_id for sample in suspects]
        found = [mine]
        if self.num_workers > 1:
            found = [[] for _ in range(self.num_workers)]
            dist.all_gather_object(found, mine)
        names = ", ".join(name for some in found for name in some)
        raise TrainingError(
            f"{what} of step {self.steps} is not finite, in a batch of {names}. If these images and their "
            "annotations are good, run the same command with a lower --learning-rate, a lower --clip-norm or "
            "a longer --warmup-epochs to go on from the last checkpoint; mended images and another "
            "--precision are a new training, with an --output of its own."
        )

    def _without_sharing(self) -> contextlib.AbstractContextManager[None]:
        if isinstance(self._network, DistributedDataParallel):
            return self._network.no_sync()
        return contextlib.nullcontext()

    def _freeze(self) -> None:
        for module in frozen_stages(self.model.backbone.body, self.recipe.freeze_stages):
            module.requires_grad_(requires_grad=False)
            freeze_norm(module)
        if self.recipe.norm == "frozen":
            freeze_norm(self.model)

    def share_statistics(self) -> None:
        """Average the normalisation's running statistics over the workers; all of them must call it."""
        if self.num_workers == 1:
            return
        tensors = [t for t in self.model.buffers() if t.is_floating_point()]
        if self.average is not None:
            learned = {name for name, _ in self.model.named_parameters()}
            tensors += [
                tensor
                for name, tensor in self.average.items()
                if name not in learned and tensor.is_floating_point()
            ]
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= self.num_workers

    def renew_statistics(self, batches: Iterable[Sequence[Sample]]) -> None:
        """Measure the statistics of what `weights` returns, on some batches; all workers must call it."""
        layers = [
            name
            for name, module in self.model.backbone.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        ]
        if not layers:
            return
        chosen = self.average if self.average is not None else self.model.state_dict()
        settings, device = self.bundle.settings, self.device
        images = (to_device(samples, settings, device)[0].tensors for samples in batches)
        for name, value in measure_statistics(settings, chosen, images, layers, device).items():
            chosen[name].copy_(value)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that are to be used: their average where one is kept. On the CPU."""
        chosen = self.average if self.average is not None else self.model.state_dict()
        return {name: tensor.cpu().contiguous() for name, tensor in chosen.items()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that a resumed run needs: tensors by name, and plain values for JSON."""
        tensors = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        for name, tensor in (self.average or {}).items():
            tensors[f"average/{name}"] = tensor
        optimizer = self.optimizer.state_dict()["state"]
        for number, values in optimizer.items():
            for key, value in values.items():
                tensors[f"optimizer/{number}/{key}"] = torch.as_tensor(value)
        plain = {"steps": self.steps, "scaler": self._scaler.state_dict()}
        return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, plain

    def load(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Go on from a state that `state` returned.

        Raises:
            TrainingError: It is of another network or optimizer.
        """
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        try:
            self.model.load_state_dict(parts["model"])
        except RuntimeError as error:
            raise TrainingError(f"the checkpoint is of another network: {error}") from error
        if self.average is not None:
            for name, tensor in self.average.items():
                tensor.copy_(parts["average"][name])
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            number, _, key = name.partition("/")
            states.setdefault(int(number), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        self.steps = plain["steps"]
        self._scaler.load_state_dict(plain["scaler"])


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Build the optimizer with two groups of parameters: with weight decay, and without."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate)
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum)


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _move_average(average: Mapping[str, Tensor], state: Mapping[str, Tensor], decay: float) -> None:
    old, new = [], []
    for name, tensor in state.items():
        if tensor.is_floating_point():
            old.append(average[name])
            new.append(tensor.detach())
        else:
            average[name].copy_(tensor)
    torch._foreach_lerp_(old, new, 1 - decay)
