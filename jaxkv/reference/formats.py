"""What the formats of a tier keep of tokens: rounded floats, and codes of groups that were
turned."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxkv.formats import LARGEST_FP16, Precision, QuantSpec

Array = NDArray[Any]
FLOATS = {Precision.FP32: np.float32, Precision.FP16: np.float16, Precision.BF16: jnp.bfloat16}


def finite(x: Array, largest: float) -> Array:
    """Float32 within +-`largest`; 0 for NaN, and for what is less than a normal number."""
    wide = np.clip(x.astype(np.float64), -largest, largest)
    return np.where(np.abs(wide) >= np.finfo(np.float32).tiny, wide, 0).astype(np.float32)


def rotate(x: Array, inverse: bool = False) -> Array:
    """Hadamard transform of the last axis, in blocks of the largest power of two that divides it.

    Sylvester's matrix times itself is `block` times the identity; the two directions share that
    factor as powers of two.
    """
    block = x.shape[-1] & -x.shape[-1]
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    halvings = math.log2(block) / 2
    factor = 2.0 ** -(math.floor(halvings) if inverse else math.ceil(halvings))
    blocks = x.reshape(*x.shape[:-1], -1, block) @ matrix * factor
    return blocks.reshape(x.shape).astype(np.float32)


LEAST_SCALE = np.float32(2.0**-100)


def as_scale(x: Array) -> Array:
    """Float32 rounded up to 9 significant bits, the sign left out: 16 bits with float32's range."""
    bits = np.maximum(x, LEAST_SCALE).astype(np.float32).view(np.int32)
    return ((bits + 0x7FFF) & ~0x7FFF).view(np.float32)


def as_zero_point(x: Array, scale: Array) -> Array:
    """The nearest float16 number of scales."""
    most = np.finfo(np.float16).max
    return np.clip(x / scale, -most, most).astype(np.float16).astype(np.float32) * scale


def quantize_groups(groups: Array, bits: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Codes, scale and zero point of groups [..., size] float32; scale and zero point are rounded
    first."""
    if symmetric:
        lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        zero_point = np.zeros_like(groups[..., :1])
        scale = as_scale(np.abs(groups).max(-1, keepdims=True) / np.float32(highest))
    else:
        lowest, highest = 0, 2**bits - 1
        low = groups.min(-1, keepdims=True)
        scale = (groups.max(-1, keepdims=True) - low) / np.float32(highest)
        scale = as_scale(np.maximum(scale, np.abs(low) * np.float32(2.0**-15)))
        zero_point = as_zero_point(low, scale)
    codes = np.clip(np.rint((groups - zero_point) / scale), lowest, highest)
    return codes, scale, zero_point


def mirror_of(first: Array, fmt: Precision | QuantSpec) -> Array:
    """The mirror [K, H] of a row whose first tokens are `first` [n, K, H]; zeros, which mirror
    nothing, unless `fmt` aligns.

    The reflection at it turns the mean, rounded to 8 bits, into a constant vector.
    """
    if isinstance(fmt, Precision) or not fmt.align:
        return np.zeros_like(first[0])
    mean = (rotate(first) if fmt.rotate else first).sum(0)
    most = np.abs(mean).max(-1, keepdims=True)
    whole = np.rint(mean * (127 / np.where(most > LEAST_SCALE, most, 1)))
    norm = np.sqrt((whole * whole).sum(-1, keepdims=True))
    unit = np.where(whole.sum(-1, keepdims=True) < 0, -whole, whole) / np.maximum(norm, 1)
    mirror = (unit - first.shape[-1] ** -0.5).astype(np.float16).astype(np.float32)
    return np.where(norm > 0, mirror, np.float32(0))


def reflect(x: Array, mirror: Array) -> Array:
    """Householder reflection of x [T, K, H] at the plane orthogonal to mirror [K, H]; its own
    inverse."""
    square = (mirror * mirror).sum(-1, keepdims=True)
    along = (x * mirror).sum(-1, keepdims=True) / np.where(square > 0, square, 1)
    return x - 2 * along * mirror


def to_groups(x: Array, spec: QuantSpec, mirror: Array) -> Array:
    """The elements of x [T, K, H] in the basis of `spec`, those that share a scale on the last
    axis."""
    x = rotate(x) if spec.rotate else x
    x = reflect(x, mirror)
    x = (
        np.moveaxis(x, 0, -1) if spec.axis == "channel" else x
    )  # a channel's group: consecutive tokens
    return x.reshape(-1, spec.group_size or x.shape[-1])


def from_groups(groups: Array, spec: QuantSpec, mirror: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `to_groups`; `shape` is that of x."""
    if spec.axis == "channel":
        x = np.moveaxis(groups.reshape(*shape[1:], shape[0]), -1, 0)
    else:
        x = groups.reshape(shape)
    x = reflect(x, mirror)
    return rotate(x, inverse=True) if spec.rotate else x


def represent(x: Array, fmt: Precision | QuantSpec, mirror: Array) -> Array:
    """What a tier of format `fmt` gives back, in float32, for tokens x [T, K, H] that enter it
    together."""
    if isinstance(fmt, Precision):
        x = np.clip(x, -LARGEST_FP16, LARGEST_FP16) if fmt is Precision.FP16 else x
        return x.astype(FLOATS[fmt]).astype(np.float32)
    codes, scale, zero_point = quantize_groups(to_groups(x, fmt, mirror), fmt.bits, fmt.symmetric)
    return from_groups(scale * codes + zero_point, fmt, mirror, x.shape)
