"""How scales and zero points are stored: 16 bits each, with the range of float32.

A scale is never negative, so 16 bits hold float32's 8 bits of exponent and 8 of its mantissa. A
zero point is a float16 that counts scales: its own 11 bits are as precise as ever, and the range is
the scale's. A scale has 9 significant bits, a zero point 11 and a code 8 at most, so that float32
holds their products exactly and no program can round them otherwise.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.codec.arithmetic import as_float16, quotient

SCALE_DTYPE = jnp.uint16
ZERO_DTYPE = jnp.float16

LEAST = 2.0**-100
"""The least scale, which a group of equal elements near zero has. All that is made of it stays in
float32's normal range: XLA:CPU flushes what is below."""

REACH = 2.0**-15
"""The least scale of a group, as a fraction of its zero point: where float16 counts in 16ths and
the codes of 4 bits still reach over its rounding."""

_DROPPED = 15  # bits of a float32 mantissa that a stored scale lacks


class Scaled(Protocol):
    """What codes are scaled with: `Quantized` or `Tokens`, with their group axes alike."""

    @property
    def scale(self) -> jax.Array | None: ...
    @property
    def zero_point(self) -> jax.Array | None: ...
    @property
    def scale_unit(self) -> jax.Array | None: ...
    @property
    def zero_unit(self) -> jax.Array | None: ...


def as_scale(x: jax.Array) -> jax.Array:
    """Float32 rounded up to what a stored scale can be, and to `LEAST` at least.

    Up, so that the largest code reaches the end of the range that the scale was made for.
    """
    bits = lax.bitcast_convert_type(jnp.maximum(x, LEAST), jnp.int32)
    up = (bits + ((1 << _DROPPED) - 1)) & -(1 << _DROPPED)
    return lax.bitcast_convert_type(up, jnp.float32)


def stored_scale(scale: jax.Array) -> jax.Array:
    """The 16 bits of an `as_scale`."""
    return (lax.bitcast_convert_type(scale, jnp.int32) >> _DROPPED).astype(SCALE_DTYPE)


def widened_scale(stored: jax.Array) -> jax.Array:
    """The inverse of `stored_scale`."""
    return lax.bitcast_convert_type(stored.astype(jnp.int32) << _DROPPED, jnp.float32)


def as_zero(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Float32 in scales, as it will be stored, in float32."""
    most = float(jnp.finfo(ZERO_DTYPE).max)
    return as_float16(jnp.clip(quotient(x, scale), -most, most))


def widened(q: Scaled) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point in float32, whatever they are stored in; None where symmetric."""
    assert q.scale is not None
    if q.scale_unit is None:
        scale = unit = widened_scale(q.scale)
    else:
        assert q.zero_unit is not None
        scale = q.scale.astype(jnp.float32) * widened_scale(q.scale_unit)
        unit = widened_scale(q.zero_unit)
    return scale, None if q.zero_point is None else q.zero_point.astype(jnp.float32) * unit


def full_zero_point(bits: int, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
    """The zero point; a symmetric code's is half the range below zero."""
    return -(2.0 ** (bits - 1)) * scale if zero_point is None else zero_point
