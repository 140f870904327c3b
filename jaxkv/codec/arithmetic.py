"""Arithmetic that gives the same bits in every program, whatever XLA fuses, rewrites or
contracts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv import platform


def alone(product: jax.Array) -> jax.Array:
    """A product that cannot melt into the sum that follows, which one program would round once and
    another twice."""
    return jnp.clip(product, -3e38, 3e38)


def nearest(x: jax.Array, least: int, most: int) -> jax.Array:
    """The whole numbers [least, most] nearest to x, ties to even, int32.

    The bits of x + 1.5 * 2**23 count them; Triton cannot round. What was clipped is no product that
    could melt into the sum. NaN counts as `least`.
    """
    counted = jnp.minimum(jnp.where(x > least, x, least), most) + 1.5 * 2.0**23
    return lax.bitcast_convert_type(counted, jnp.int32) - 0x4B400000


def as_float16(x: jax.Array) -> jax.Array:
    """Float32 within float16's range, rounded to what a float16 holds, in float32.

    By its bits, as XLA takes a cast there and back for nothing where it may keep more precision (on
    GPUs: codes were then made with a zero point that is not the stored one, which changed 17 % of
    4-bit scales on an H200).
    """
    if platform.name() == "cpu":
        return x.astype(jnp.float16).astype(jnp.float32)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & -(1 << 13)  # ties to even
    subnormal = nearest(x * 2.0**24, -1024, 1024).astype(jnp.float32) * 2.0**-24
    normal = lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(jnp.abs(x) < 2.0**-14, subnormal, normal)


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Floats as sums of two of 12 significant bits."""
    first = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & -4096, jnp.float32)
    return first, x - first


def quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y rounded to nearest, for finite quotients.

    CPUs divide so. GPUs are off by up to 2 units in the last place, in XLA's programs and in
    Triton's (29 % of quotients of bfloat16 numbers by scales on an H200), and a bfloat16 model's
    tokens, which have few bits, often lie on ties. What the quotient lacks is found from products
    of 12 bits, which are exact, and added.
    """
    first = x / y
    return first if platform.name() == "cpu" else _nearer(first, x, y)


def _nearer(first: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y rounded to nearest, from a quotient that is off by a few units."""
    return first + _left(x, first, y) * (1 / y)


def root(x: jax.Array) -> jax.Array:
    """The square root of x >= 0, rounded to nearest as `quotient`."""
    first = jnp.sqrt(x)
    if platform.name() == "cpu":
        return first
    return first + _left(x, first, first) * (0.5 / jnp.where(first > 0, first, 1.0))


def _left(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x - a * b where the product is nearly x, exact."""
    (a, a_low), (b, b_low) = halves(a), halves(b)
    return (((x - a * b) - a * b_low) - a_low * b) - a_low * b_low


def to_unit(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., X] as y * 2**e: y with its largest element in [1, 4), and e [..., 1] int32. Exact;
    zeros stay zeros, and what is not finite stays that."""
    most = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    exponent = jnp.clip((lax.bitcast_convert_type(most, jnp.int32) >> 23) - 127, -126, 126)
    return x * power_of_two(-exponent), exponent


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2.0**exponent for exponents in -126 .. 127."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def tree_sum(x: jax.Array, axis: int) -> jax.Array:
    """The sum along an axis, kept with size 1, added in one fixed order whatever surrounds it."""
    x = jnp.moveaxis(x, axis, -1)
    lacking = (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, lacking)]) if lacking else x
    while x.shape[-1] > 1:
        first, second = jnp.split(x, 2, axis=-1)
        x = first + second
    return jnp.moveaxis(x, -1, axis)


def totals(*whole: jax.Array) -> list[jax.Array]:
    """The sums of int32 arrays of one shape along their last axis, kept with size 1.

    On CPUs in one pass over all of them: XLA computes what goes into a sum once for each, and four
    sums of a fit took 2.4 times as long.
    """
    if platform.name() != "cpu":
        return [x.sum(-1, keepdims=True, dtype=jnp.int32) for x in whole]
    axis, zeros = whole[0].ndim - 1, [jnp.int32(0)] * len(whole)
    sums = lax.reduce(
        list(whole), zeros, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], [axis]
    )
    return [jnp.expand_dims(x, -1) for x in sums]
