"""The five losses of Mask R-CNN (He et al., https://arxiv.org/abs/1703.06870), as sums and counts.

The mathematics are torchvision's `RegionProposalNetwork` and `RoIHeads` in training, part by part,
with three differences. Losses come as sums with the counts to divide them by, so that workers which
share a batch can divide by the counts of the whole batch. Masks are crops until RoIAlign reads
them. What lies in a crowd's box is neither right nor wrong.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, box_area, box_iou, roi_align

from segmodel import roi_align as roi_align_cpu
from segmodel.settings import MaskTargets

LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")

# torchvision's values for the smooth L1 losses of RPN and box head.
BOX_BETA = 1 / 9
# A box of which more than this share lies in a crowd is ignored where it would count as background.
CROWD_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Target:
    """The N instances of one image, on the network's device.

    Attributes:
        boxes_xyxy: (N, 4) float32, pixels of the network's input.
        labels: (N,) int64, 1 or more.
        crops: N masks, each (h, w) uint8 of 0 and 1, over its own box.
        crowds_xyxy: (C, 4) float32.
        scale: Pixels of the network's input for one of the stored image.
    """

    boxes_xyxy: Tensor
    labels: Tensor
    crops: Sequence[Tensor]
    crowds_xyxy: Tensor
    scale: float


class LossSums(nn.Module):
    """A Mask R-CNN whose forward pass gives losses; what `DistributedDataParallel` wraps."""

    def __init__(
        self,
        model: MaskRCNN,
        autocast_dtype: torch.dtype | None = None,
        mask_targets: MaskTargets = "torchvision",
    ) -> None:
        """Take a model in training mode; RoIAlign, NMS and the losses stay fp32 in any case."""
        super().__init__()
        self.model = model
        self.autocast_dtype = autocast_dtype
        self.mask_targets = mask_targets

    def forward(self, images: ImageList, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
        """Return the sums of the losses, and the counts to divide them by.

        Args:
            images: Normalised and padded, float32.
            targets: One for each image; images without instances are welcome.

        Returns:
            sums: (5,) float32 in the order of `LOSSES`, with gradients.
            counts: (5,) float32, sampled anchors (twice), sampled proposals (twice), pixels of the
                positive proposals' masks.
        """
        with self._autocast(images.tensors):
            features = self.model.backbone(images.tensors)
        features = {name: feature.float() for name, feature in features.items()}
        proposals, rpn_sums, num_anchors = self._propose(images, features, targets)
        box_sums, mask_sum, num_boxes, num_pixels = self._classify(
            images, features, proposals, targets
        )
        sums = torch.stack([*rpn_sums, *box_sums, mask_sum])
        counts = [num_anchors, num_anchors, num_boxes, num_boxes, num_pixels]
        return sums, torch.tensor(counts, dtype=torch.float32, device=sums.device)

    def _autocast(self, like: Tensor) -> AbstractContextManager[object]:
        dtype = self.autocast_dtype
        return torch.autocast(like.device.type, dtype, enabled=dtype is not None)

    def _propose(
        self, images: ImageList, features: dict[str, Tensor], targets: Sequence[Target]
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor], int]:
        """Region proposals, the sums of objectness and box loss, and how many anchors they are of."""
        rpn = self.model.rpn
        levels = list(features.values())
        with self._autocast(levels[0]):
            objectness, deltas = rpn.head(levels)
        anchors = rpn.anchor_generator(images, levels)
        per_level = [level[0].numel() for level in objectness]
        scores, offsets = concat_box_prediction_layers(
            [level.float() for level in objectness], [level.float() for level in deltas]
        )
        with torch.no_grad():
            decoded = rpn.box_coder.decode(offsets, anchors).view(len(anchors), -1, 4)
            proposals, _ = rpn.filter_proposals(decoded, scores, images.image_sizes, per_level)
            labels, boxes = rpn.assign_targets_to_anchors(
                anchors, [{"boxes": target.boxes_xyxy} for target in targets]
            )
            for image_labels, image_anchors, target in zip(labels, anchors, targets, strict=True):
                _ignore_crowds(image_labels, image_anchors, target)
            chosen = rpn.fg_bg_sampler(labels)
            positive, negative = (torch.where(torch.cat(some))[0] for some in chosen)
            sampled = torch.cat([positive, negative])
            (wanted,) = rpn.box_coder.encode(
                [torch.cat(boxes)[positive]], [torch.cat(anchors)[positive]]
            )
        box_sum = functional.smooth_l1_loss(
            offsets[positive], wanted, beta=BOX_BETA, reduction="sum"
        )
        objectness_sum = functional.binary_cross_entropy_with_logits(
            scores.flatten()[sampled], torch.cat(labels)[sampled], reduction="sum"
        )
        return proposals, (objectness_sum, box_sum), len(sampled)

    def _classify(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: Sequence[Tensor],
        targets: Sequence[Target],
    ) -> tuple[tuple[Tensor, Tensor], Tensor, int, int]:
        """The sums of class, box and mask loss; of how many proposals; of how many mask pixels."""
        heads = self.model.roi_heads
        with torch.no_grad():
            chosen = [
                self._sample(boxes, target)
                for boxes, target in zip(proposals, targets, strict=True)
            ]
        boxes = [one.boxes_xyxy for one in chosen]
        pooled = _pool(heads.box_roi_pool, images, features, boxes)
        with self._autocast(pooled):
            logits, offsets = heads.box_predictor(heads.box_head(pooled))
        labels = torch.cat([one.labels for one in chosen])
        class_sum = functional.cross_entropy(logits.float(), labels, reduction="sum")

        positive = torch.where(labels > 0)[0]
        wanted = torch.cat(
            heads.box_coder.encode([one.matched_xyxy for one in chosen], boxes), dim=0
        )
        of_label = offsets.float().view(len(labels), -1, 4)[positive, labels[positive]]
        box_sum = functional.smooth_l1_loss(
            of_label, wanted[positive], beta=BOX_BETA, reduction="sum"
        )
        mask_sum, num_pixels = self._masks(images, features, chosen, targets)
        return (class_sum, box_sum), mask_sum, len(labels), num_pixels

    def _sample(self, proposals: Tensor, target: Target) -> "_Chosen":
        """Match the proposals of an image, and its true boxes, with the truth, and draw some."""
        heads = self.model.roi_heads
        boxes = torch.cat([proposals, target.boxes_xyxy])
        (matched,), (labels,) = heads.assign_targets_to_proposals(
            [boxes], [target.boxes_xyxy], [target.labels]
        )
        _ignore_crowds(labels, boxes, target)
        (drawn,) = heads.subsample([labels])
        boxes, labels, matched = boxes[drawn], labels[drawn], matched[drawn]
        # Where there is no truth, `matched` points at nothing, and no box is positive.
        truth = target.boxes_xyxy if len(target.boxes_xyxy) else boxes.new_zeros(1, 4)
        return _Chosen(boxes, labels, matched, truth[matched])

    def _masks(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        chosen: Sequence["_Chosen"],
        targets: Sequence[Target],
    ) -> tuple[Tensor, int]:
        heads = self.model.roi_heads
        positive = [torch.where(one.labels > 0)[0] for one in chosen]
        boxes = [one.boxes_xyxy[some] for one, some in zip(chosen, positive, strict=True)]
        pooled = _pool(heads.mask_roi_pool, images, features, boxes)
        with self._autocast(pooled):
            logits = heads.mask_predictor(heads.mask_head(pooled))
        labels = torch.cat([one.labels[some] for one, some in zip(chosen, positive, strict=True)])
        regions = boxes
        if self.mask_targets == "pasted":
            side = logits.shape[-1]
            regions = [_spread(b, t.scale, side) for b, t in zip(boxes, targets, strict=True)]
        with torch.no_grad():
            wanted = [
                project_masks(target, image_boxes, one.matched[some], size_hw, logits.shape[-1])
                for target, image_boxes, one, some, size_hw in zip(
                    targets, regions, chosen, positive, images.image_sizes, strict=True
                )
            ]
        of_label = logits.float()[torch.arange(len(labels), device=labels.device), labels]
        mask_sum = functional.binary_cross_entropy_with_logits(
            of_label, torch.cat(wanted), reduction="sum"
        )
        return mask_sum, of_label.numel()


@dataclass(frozen=True)
class _Chosen:
    """The P proposals of an image that are trained on."""

    boxes_xyxy: Tensor
    labels: Tensor  # (P,) int64, 0 for background
    matched: Tensor  # (P,) int64, instance that each fits best
    matched_xyxy: Tensor  # (P, 4), its box


def _spread(boxes_xyxy: Tensor, scale: float, side: int) -> Tensor:
    """Return the regions over which the masks of boxes are pasted, on average.

    `paste_masks_in_image` of torchvision pads a mask of M cells by one on each side and grows its box
    likewise, cuts the corners down to whole pixels of the stored image, and takes the last pixel too:
    M + 2 cells lie over half a pixel more at each side than they should, M cells over M / (M + 2) of it.

    Args:
        boxes_xyxy: (P, 4) float32, pixels of the network's input.
        scale: Those pixels for one of the stored image.
        side: M.
    """
    margin = 0.5 * scale * side / (side + 2)
    return boxes_xyxy + boxes_xyxy.new_tensor([-margin, -margin, margin, margin])


def project_masks(
    target: Target, boxes_xyxy: Tensor, matched: Tensor, size_hw: tuple[int, int], side: int
) -> Tensor:
    """Cut masks to boxes and scale them to the mask head's grid: torchvision's `project_masks_on_boxes`.

    A crop is read as if it lay in its full-size mask: RoIAlign takes the pixels around it as 0, and
    repeats the image's last row and column beyond the image's border.

    Args:
        target: The image's instances.
        boxes_xyxy: (P, 4) float32, within the image.
        matched: (P,) int64, the instance of each box.
        size_hw: The image's.
        side: M.

    Returns:
        (P, M, M) float32, 0..1.
    """
    wanted = boxes_xyxy.new_zeros(len(boxes_xyxy), side, side)
    instances = matched.tolist()
    corners = target.boxes_xyxy.tolist()
    for instance in sorted(set(instances)):
        of = [place for place, one in enumerate(instances) if one == instance]
        left, top, right, bottom = corners[instance]
        # A frame of zeros, but none at the image's border, beyond which RoIAlign has its own way.
        frame = (left > 0, right < size_hw[1], top > 0, bottom < size_hw[0])
        mask = functional.pad(target.crops[instance], tuple(map(int, frame)))
        origin = boxes_xyxy.new_tensor([left - frame[0], top - frame[2]]).repeat(2)
        wanted[of] = roi_align(
            mask[None, None].float(), [boxes_xyxy[of] - origin], (side, side), 1.0
        )[:, 0]
    return wanted


def _pool(
    pooler: MultiScaleRoIAlign,
    images: ImageList,
    features: dict[str, Tensor],
    boxes: list[Tensor],
) -> Tensor:
    if images.tensors.device.type == "cpu":
        return roi_align_cpu.pool(pooler, features, boxes)
    pooled: Tensor = pooler(features, boxes, images.image_sizes)
    return pooled


def _ignore_crowds(labels: Tensor, boxes_xyxy: Tensor, target: Target) -> None:
    """Set the label of background boxes that lie in crowds to -1, which samplers pass over."""
    if len(target.crowds_xyxy):
        labels[(labels == 0) & _in_crowd(boxes_xyxy, target.crowds_xyxy)] = -1


def _in_crowd(boxes_xyxy: Tensor, crowds_xyxy: Tensor) -> Tensor:
    """Say which boxes, (K, 4), lie mostly in one of the crowds, (C, 4): (K,) bool."""
    # intersection = IoU / (1 + IoU) * (area + area), and its share of the box is asked.
    iou = box_iou(boxes_xyxy, crowds_xyxy)
    areas = box_area(boxes_xyxy)[:, None]
    intersection = iou / (1 + iou) * (areas + box_area(crowds_xyxy))
    inside: Tensor = (intersection > CROWD_SHARE * areas).any(dim=1)
    return inside
