"""Quantize and dequantize: how the numbers of one tier are written down.

A quantized element is `scale * code + zero_point` with a code of 0 .. 2**bits - 1; `pack` says how
codes lie in words, `scales` how scales and zero points are stored.

Every step here gives the same bits in every program (`arithmetic`): sums are of integers, factors
are powers of two, so that a fused multiply-add rounds as its parts do, or products stand alone, and
constants multiply (XLA divides by them in some programs and multiplies by their inverse in others).
What is stored therefore does not depend on how tokens arrived.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.codec.arithmetic import alone, nearest, quotient, totals
from jaxkv.codec.pack import pack, unpack
from jaxkv.codec.scales import (
    LEAST,
    REACH,
    ZERO_DTYPE,
    as_scale,
    as_zero,
    full_zero_point,
    stored_scale,
    widened,
)
from jaxkv.formats import QuantSpec
from jaxkv.trees import node

CUT = {4: 0.04, 3: 0.08, 2: 0.16}
"""The share of a group's range that is cut off at both ends before the fits, per bits."""

FITS = {4: 2, 3: 2, 2: 3}
"""Least-squares fits after the cut, per bits. Trying 15 cuts before two fits leaves 5 % less
squared error for 4 times the work."""


@node
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Quantized tokens on their way into or out of a tier, group axes beside their elements."""

    codes: jax.Array  # [B, T, K, W] int8, see `pack`
    # token axis [B, T, K or 1, H // group]; channel axis [B, T // group, K, H]; uint16 (`scales`),
    # two-level uint8
    scale: jax.Array | None
    zero_point: jax.Array | None  # float16 in scales, two-level int8; None where symmetric
    scale_unit: jax.Array | None = None  # two-level: [B, T, 1, 1] uint16
    zero_unit: jax.Array | None = None


def quantize(spec: QuantSpec, x: jax.Array) -> Quantized:
    """Quantizes tokens [B, T, K, H] float32, finite, in the basis of their tier.

    Scale and zero point are rounded to 16 bits first and the codes are computed with the rounded
    ones, so that |x - dequantized| <= scale / 2 inside the range that they span.
    """
    groups, axis = _grouped(spec, x)
    low, high = groups.min(axis, keepdims=True), groups.max(axis, keepdims=True)
    if spec.symmetric:
        scale = as_scale(jnp.maximum(-low, high) * (2 / (spec.levels - 1)))
        zero = jnp.full_like(scale, -(2.0 ** (spec.bits - 1)))
    elif spec.bits == 8 or spec.axis == "channel":
        scale = _scale_of(low, (high - low) * (1 / spec.levels))
        zero = as_zero(low, scale)
    else:
        scale, zero = _best_range(spec, groups, low, high)
    stored = [stored_scale(scale), None if spec.symmetric else zero.astype(ZERO_DTYPE)]
    units = [None, None]
    zero_point = scale * zero
    if spec.two_level:
        stored, units, (scale, zero_point) = _two_level(scale, zero_point)
    codes = _codes(spec, groups, scale, zero_point).reshape(x.shape)
    words = pack(codes, spec.bits)
    return Quantized(words, *(a if a is None else a.squeeze(axis) for a in (*stored, *units)))


def _two_level(scale: jax.Array, zero_point: jax.Array) -> tuple[list[Any], list[Any], list[Any]]:
    """Scales and zero points [B, T, K, n, 1] as small integers, their units per token, and what
    both come to."""
    units = [_unit(scale, 255), _unit(zero_point, 127)]
    whole = [
        nearest(quotient(scale, units[0]), 1, 255),
        nearest(quotient(zero_point, units[1]), -127, 127),
    ]
    wide = [a.astype(jnp.float32) * unit for a, unit in zip(whole, units, strict=True)]
    stored = [whole[0].astype(jnp.uint8), whole[1].astype(jnp.int8)]
    return stored, [stored_scale(unit) for unit in units], wide


def _unit(x: jax.Array, most: int) -> jax.Array:
    """What [B, T, K, n, 1] is counted in, per token: its largest element is `most` of them."""
    return as_scale(jnp.max(jnp.abs(x), axis=(2, 3), keepdims=True) * (1 / most))


def _scale_of(low: jax.Array, scale: jax.Array) -> jax.Array:
    """The scale as it will be stored of a group whose zero point is near `low`."""
    return as_scale(jnp.maximum(scale, jnp.abs(low) * REACH))


def _best_range(
    spec: QuantSpec, x: jax.Array, low: jax.Array, high: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point (in scales) of groups [..., g] of least squared error among: the whole
    range, a cut one, and fits to the best one's codes.

    Errors are summed as integers, the same in every program. Channel groups and 8 bits are better
    off with the whole range.
    """
    extent, cut = high - low, CUT[spec.bits]
    widest = _scale_of(low, extent * (1 / spec.levels))
    shorter = _scale_of(low, extent * ((1 - 2 * cut) / spec.levels)), low + alone(extent * cut)
    unit = extent * 2.0**-12
    whole = nearest(quotient(x - low, jnp.where(extent > LEAST, unit, 1.0)), 0, 2**12)
    (sum_whole,) = totals(whole)

    def attempt(index: jax.Array, found: tuple[_Fit, _Range]) -> tuple[_Fit, _Range]:
        """Weighs one candidate and makes the next. A loop, as its body is two dozen operations to
        compile."""
        best, (scale, start) = found
        zero = as_zero(start, scale)
        codes = _codes(spec, x, scale, scale * zero)
        missed = x - (codes.astype(jnp.float32) * scale + scale * zero)
        missed = nearest(missed * quotient(jnp.float32(64), widest), -1024, 1024)
        error, *sums = totals(missed * missed, codes, codes * whole, codes * codes)
        new, is_better = (scale, zero, error, *sums), (index == 0) | (error < best[2])
        best = tuple(jnp.where(is_better, n, o) for n, o in zip(new, best, strict=True))
        fitted = _fit(low, unit, (sum_whole, *best[3:]), best[0], x.shape[-1])
        follow = (jnp.where(index == 0, *pair) for pair in zip(shorter, fitted, strict=True))
        return best, (next(follow), next(follow))

    none = jnp.zeros_like(sum_whole)
    start = (widest, jnp.zeros_like(low), none, none, none, none), (widest, low)
    best, _ = lax.fori_loop(jnp.int32(0), jnp.int32(2 + FITS[spec.bits]), attempt, start)
    return best[0], best[1]


_Range = tuple[jax.Array, jax.Array]
"""Scale and lowest value."""

_Fit = tuple[jax.Array, ...]
"""Scale, zero point in scales, squared error in 64ths of the widest scale, and sums over a group:
of codes, of their products with the elements in whole units, of their squares."""


def _fit(
    low: jax.Array, unit: jax.Array, sums: tuple[jax.Array, ...], scale: jax.Array, size: int
) -> _Range:
    """Scale and lowest value by least squares over given codes; sums of integers, hence exact.

    Means of codes are taken apart into whole and rest: for groups of thousands the products of sums
    would not fit int32.
    """
    sum_whole, sum_codes, sum_both, sum_squares = sums
    mean = sum_codes // size
    rest = (sum_codes - mean * size).astype(jnp.float32) * (1 / size)
    total, total_whole = sum_codes.astype(jnp.float32), sum_whole.astype(jnp.float32)
    spread = (sum_squares - mean * sum_codes).astype(jnp.float32) - alone(rest * total)
    both = (sum_both - mean * sum_whole).astype(jnp.float32) - alone(rest * total_whole)
    slope = quotient(both, jnp.where(spread > 0, spread, 1.0))
    fitted = jnp.where((spread > 0) & (slope > 0), _scale_of(low, slope * unit), scale)
    shift = alone((alone(total_whole * unit) - alone(fitted * total)) * (1 / size))
    return fitted, low + shift


def _codes(spec: QuantSpec, x: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
    return nearest(quotient(x - zero_point, scale), 0, spec.levels)


def dequantize(spec: QuantSpec, q: Quantized) -> jax.Array:
    """The tokens [B, T, K, H] float32 that the codes stand for, still rotated and centred."""
    codes = unpack(q.codes, spec.bits)[..., : _head_dim(spec, q)].astype(jnp.float32)
    groups, axis = _grouped(spec, codes)
    scale, zero_point = widened(q)
    zero_point = full_zero_point(spec.bits, scale, zero_point)
    return (groups * jnp.expand_dims(scale, axis) + jnp.expand_dims(zero_point, axis)).reshape(
        codes.shape
    )


def _head_dim(spec: QuantSpec, q: Quantized) -> int | None:
    """The elements of a head, of which `pack` may have made more."""
    assert q.scale is not None
    if spec.axis == "channel":
        return q.scale.shape[-1]
    heads, groups = q.codes.shape[-2], q.scale.shape[-2] * q.scale.shape[-1]
    return None if spec.group_size is None else spec.group_size * groups // heads


def _grouped(spec: QuantSpec, x: jax.Array) -> tuple[jax.Array, int]:
    """Tokens [B, T, K, H] with the elements of a group on an axis of their own, and that axis."""
    b, t, k, h = x.shape
    group = spec.group_size or h
    if spec.axis == "channel":
        return x.reshape(b, t // group, group, k, h), 2
    if group > h:
        return x.reshape(b, t, 1, 1, k * h), 4
    return x.reshape(b, t, k, h // group, group), 4
