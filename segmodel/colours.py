"""Random changes of a sample's colours: brightness, contrast, saturation, hue, grey, inverted."""

import math
from dataclasses import replace

import numpy as np

from segmodel.kernels import compiled
from segmodel.schema import Float32
from segmodel.targets import Sample, UInt8

# Colours at full strength: factors are drawn from 1 - x to 1 + x, the hue in turns of its circle.
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE_TURNS = 0.4, 0.4, 0.4, 0.05
# Chances at full strength. Dark on light and light on dark are both common under a microscope only.
_GREY_CHANCE, _INVERT_CHANCE = 0.2, 0.1
# The mean that contrast keeps is taken of every n-th row and column: it need not be exact.
_MEAN_STEP = 4

# ITU-R BT.601, as in torchvision; the hue is turned in the plane of YIQ's I and Q.
_LUMA = np.array([0.299, 0.587, 0.114])
_RGB_TO_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)


def jitter_colours(sample: Sample, strength: float, rng: np.random.Generator) -> Sample:
    """Change hue, saturation, contrast and brightness; now and then drop colour, or invert.

    All of it is one affine map of RGB, so that there is one pass over the pixels, and values are cut
    to 0..255 once, at its end. torchvision's `ColorJitter` cuts after each step.

    Args:
        sample: Of any size; the masks stay.
        strength: 0..1; 0 changes nothing. At 1, brightness, contrast and saturation change by up to
            40 %, the hue by up to a twentieth of the circle; 1 image in 5 is grey, 1 in 10 inverted.
        rng: Decides.
    """
    mean = float(sample.image[::_MEAN_STEP, ::_MEAN_STEP].mean(axis=(0, 1)) @ _LUMA)
    matrix, offset = _draw_colours(strength, mean, rng)
    # For memory that cannot be written, the kernel would be compiled once more.
    image = _mapped(np.require(sample.image, requirements=["C", "W"]), matrix, offset)
    return replace(sample, image=image)


def _draw_colours(
    strength: float, mean: float, rng: np.random.Generator
) -> tuple[Float32, Float32]:
    """Draw a map of colours: (3, 3) and (3,) float32, of an image of this mean luma."""
    spans = np.array([_BRIGHTNESS, _CONTRAST, _SATURATION, 2 * math.pi * _HUE_TURNS])
    *factors, angle = rng.uniform(-1, 1, 4) * spans * strength
    brightness, contrast, saturation = (1 + factor for factor in factors)
    is_grey, is_inverted = rng.random(2) < strength * np.array([_GREY_CHANCE, _INVERT_CHANCE])
    if is_grey:
        saturation = 0.0
    cos, sin = math.cos(angle), math.sin(angle)
    turn = _YIQ_TO_RGB @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _RGB_TO_YIQ
    saturate = saturation * np.eye(3) + (1 - saturation) * _LUMA
    matrix = brightness * contrast * saturate @ turn
    offset = np.full(3, brightness * (1 - contrast) * mean)
    if is_inverted:
        matrix, offset = -matrix, 255 - offset
    return matrix.astype(np.float32), offset.astype(np.float32)


def _map_colours(image: UInt8, matrix: Float32, offset: Float32) -> UInt8:
    mapped = np.empty_like(image)
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            red = np.float32(image[i, j, 0])
            green = np.float32(image[i, j, 1])
            blue = np.float32(image[i, j, 2])
            for k in range(3):
                level = matrix[k, 0] * red + matrix[k, 1] * green + matrix[k, 2] * blue + offset[k]
                level = min(max(level + np.float32(0.5), np.float32(0)), np.float32(255))
                mapped[i, j, k] = np.uint8(np.int32(level))
    return mapped


# NumPy needs more than twice as long: each of its steps goes through all pixels once.
_mapped = compiled(_map_colours, fastmath=True)
