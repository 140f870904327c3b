"""Quantize and dequantize: how the numbers of one tier are written down.

A quantized element is `scale * code + zero_point` with a code of 0 .. 2**bits - 1; `pack` says how
codes lie in words.

Every step here gives the same bits in every program (`arithmetic`): sums are of integers, factors
are powers of two, so that a fused multiply-add rounds as its parts do, or products stand alone, and
constants multiply (XLA divides by them in some programs and multiplies by their inverse in others).
What is stored therefore does not depend on how tokens arrived.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxkv.codec.arithmetic import alone, nearest
from jaxkv.codec.pack import pack, unpack
from jaxkv.formats import QuantSpec

SCALE_DTYPE = jnp.float16

CUT = {4: 0.04, 2: 0.16}
"""The share of a group's range that is cut off at both ends before the fits, per bits."""

NO_EXTENT = 2.0**-14
"""The scale of a group of equal elements: the least normal number of 16 bits."""

FITS = {4: 2, 2: 3}
"""Least-squares fits after the cut, per bits. Trying 15 cuts before two fits leaves 5 % less
squared error for 4 times the work."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Quantized tokens on their way into or out of a tier, group axes beside their elements."""

    codes: jax.Array  # [B, T, K, H // codes_per_byte] int8
    # token axis [B, T, K or 1, H // group]; channel axis [B, T // group, K, H]; float16,
    # two-level uint8
    scale: jax.Array | None
    zero_point: jax.Array | None  # as scale (two-level int8); None where symmetric
    scale_unit: jax.Array | None = None  # two-level: [B, T, 1, 1] float16
    zero_unit: jax.Array | None = None


def quantize(spec: QuantSpec, x: jax.Array) -> Quantized:
    """Quantizes tokens [B, T, K, H] float32, in the basis of their tier.

    Scale and zero point are rounded to 16 bits first and the codes are computed with the rounded
    ones, so that
    |x - dequantized| <= scale / 2 inside the range that they span.
    """
    groups, axis = _grouped(spec, x)
    low, high = groups.min(axis, keepdims=True), groups.max(axis, keepdims=True)
    if spec.symmetric:
        scale = _rounded(jnp.maximum(-low, high) * (2 / (spec.levels - 1)))
        zero_point = -scale * 2.0 ** (spec.bits - 1)
    elif spec.bits == 8 or spec.axis == "channel":
        scale, zero_point = _rounded((high - low) * (1 / spec.levels)), _half(low)
    else:
        scale, zero_point = _best_range(spec, groups, low, high)
    units: tuple[jax.Array | None, jax.Array | None] = (None, None)
    stored = scale.astype(SCALE_DTYPE), zero_point.astype(SCALE_DTYPE)
    if spec.two_level:
        units = _unit(scale, 255), _unit(zero_point, 127)
        stored = _whole(scale, units[0], 1, 255), _whole(zero_point, units[1], -127, 127)
        scale, zero_point = (
            a.astype(jnp.float32) * unit for a, unit in zip(stored, units, strict=True)
        )
    codes = _codes(spec, groups, scale, zero_point).reshape(x.shape)
    stored_scale, stored_zero = (a.squeeze(axis) for a in stored)
    halves = [unit if unit is None else unit.squeeze(axis).astype(SCALE_DTYPE) for unit in units]
    return Quantized(
        pack(codes, spec.bits), stored_scale, None if spec.symmetric else stored_zero, *halves
    )


def _unit(x: jax.Array, most: int) -> jax.Array:
    """What [B, T, K, n, 1] is counted in, per token: its largest element is `most` of them. As it
    will be stored, in float32."""
    return _rounded(jnp.max(jnp.abs(x), axis=(2, 3), keepdims=True) * (1 / most))


def _whole(x: jax.Array, unit: jax.Array | None, least: int, most: int) -> jax.Array:
    assert unit is not None
    return nearest(x / unit, least, most).astype(jnp.uint8 if least > 0 else jnp.int8)


def _best_range(
    spec: QuantSpec, x: jax.Array, low: jax.Array, high: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of groups [..., g] of least squared error among: the whole range, a cut
    one, and fits to the best one's codes.

    Errors are summed as integers, the same in every program. Channel groups and 8 bits are better
    off with the whole range.
    """
    extent, cut = high - low, CUT[spec.bits]
    scale = _rounded(extent * (1 / spec.levels))
    best = scale, _half(low), _error(spec, x, scale, _half(low), scale)
    cut_scale, cut_low = (
        _rounded(extent * ((1 - 2 * cut) / spec.levels)),
        _half(low + alone(extent * cut)),
    )
    best = _better(best, (cut_scale, cut_low, _error(spec, x, cut_scale, cut_low, scale)))
    for _ in range(FITS[spec.bits]):
        fitted = _fit(spec, x, low, extent, *best[:2])
        best = _better(best, (*fitted, _error(spec, x, *fitted, scale)))
    return best[0], best[1]


def _fit(
    spec: QuantSpec,
    x: jax.Array,
    low: jax.Array,
    extent: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point by least squares over the codes that the given ones produce; sums of
    integers, hence exact.

    Means of codes are taken apart into whole and rest: for groups of thousands the products of sums
    would not fit int32.
    """
    unit = extent * 2.0**-12
    whole = nearest((x - low) / jnp.where(extent > 0, unit, 1.0), 0, 2**12)
    codes, size = _codes(spec, x, scale, zero_point), x.shape[-1]
    sum_codes, sum_whole, sum_both, sum_squares = (
        a.sum(-1, keepdims=True) for a in (codes, whole, codes * whole, codes * codes)
    )
    mean = sum_codes // size
    rest = (sum_codes - mean * size).astype(jnp.float32) * (1 / size)
    spread = (sum_squares - mean * sum_codes).astype(jnp.float32) - alone(rest * sum_codes)
    slope = (
        (sum_both - mean * sum_whole).astype(jnp.float32) - alone(rest * sum_whole)
    ) / jnp.where(spread > 0, spread, 1.0)
    fitted = jnp.where((spread > 0) & (slope > 0), _rounded(slope * unit), scale)
    return fitted, _half(
        low + alone((alone(sum_whole * unit) - alone(fitted * sum_codes)) * (1 / size))
    )


_Fit = tuple[jax.Array, jax.Array, jax.Array]  # scale, zero point, error


def _better(old: _Fit, new: _Fit) -> _Fit:
    scale, zero_point, error = (
        jnp.where(new[2] < old[2], n, o) for n, o in zip(new, old, strict=True)
    )
    return scale, zero_point, error


def _error(
    spec: QuantSpec, x: jax.Array, scale: jax.Array, zero_point: jax.Array, unit: jax.Array
) -> jax.Array:
    """The squared error of groups [..., g] in 64ths of a unit, int32 [..., 1]."""
    missed = x - (_codes(spec, x, scale, zero_point) * scale + zero_point)
    whole = nearest(missed * (64 / unit), -1024, 1024)
    return (whole * whole).sum(-1, keepdims=True)


def _codes(spec: QuantSpec, x: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
    return nearest((x - zero_point) / scale, 0, spec.levels)


def _half(x: jax.Array) -> jax.Array:
    """Rounded as it will be stored, in float32."""
    limit = jnp.finfo(SCALE_DTYPE).max
    return jnp.clip(x, -limit, limit).astype(SCALE_DTYPE).astype(jnp.float32)


def dequantize(spec: QuantSpec, q: Quantized) -> jax.Array:
    """The tokens [B, T, K, H] float32 that the codes stand for, still rotated and centred."""
    codes = unpack(q.codes, spec.bits).astype(jnp.float32)
    groups, axis = _grouped(spec, codes)
    scale, zero_point = widened(q.scale, q.scale_unit), widened(q.zero_point, q.zero_unit)
    assert scale is not None
    zero_point = full_zero_point(spec, scale, zero_point)
    return (groups * jnp.expand_dims(scale, axis) + jnp.expand_dims(zero_point, axis)).reshape(
        codes.shape
    )


def widened(stored: jax.Array | None, unit: jax.Array | None) -> jax.Array | None:
    """Scales or zero points in float32, whatever they are stored in."""
    if stored is None:
        return None
    wide = stored.astype(jnp.float32)
    return wide if unit is None else wide * unit.astype(jnp.float32)


def full_zero_point(spec: QuantSpec, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
    """The zero point in float32; a symmetric code's is half the range below zero."""
    if zero_point is None:
        return scale.astype(jnp.float32) * -(2.0 ** (spec.bits - 1))
    return zero_point.astype(jnp.float32)


def _grouped(spec: QuantSpec, x: jax.Array) -> tuple[jax.Array, int]:
    """Tokens [B, T, K, H] with the elements of a group on an axis of their own, and that axis."""
    b, t, k, h = x.shape
    group = spec.group_size or h
    if spec.axis == "channel":
        return x.reshape(b, t // group, group, k, h), 2
    if group > h:
        return x.reshape(b, t, 1, 1, k * h), 4
    return x.reshape(b, t, k, h // group, group), 4


def _rounded(scale: jax.Array) -> jax.Array:
    """A scale as it will be stored, in float32; a small one for a group without extent, whose codes
    are then all the same.

    Attention on CPUs counts in units of a block's largest scale: a large one here would spoil the
    block.
    """
    stored = _half(scale)
    return jnp.where(stored > 0, stored, NO_EXTENT)
