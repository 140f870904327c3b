"""Balance of channels: keys are multiplied by a factor per channel before they are turned, queries
divided by it. The same bits in every program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.codec.arithmetic import alone, tree_sum

UNEVEN = 1.5
"""How many times the mean variance of a head's channels exceeds the square of their mean deviation
where balance pays: 1.1 to 1.4 in most heads, 1.7 to 6 in those that need it."""

ONE = 0x3F800000  # the bits of 1.0
KEPT = -(1 << 20)  # a factor's exponent and 3 bits of its mantissa


def balance_of(variance: jax.Array) -> jax.Array:
    """The balance [..., H] int32 of channels of these variances: `factor` is about their -1/4
    power, a geometric mean of 1; 0 where a head is even.

    After a rotation all channels bear the same error; dividing each by the square root of its
    deviation first leaves the least error of scores, for queries of equal size. Roots are taken of
    a float's bits as a fixed-point logarithm, so that no platform rounds one otherwise.
    """
    most = variance.max(-1, keepdims=True)
    floored = jnp.maximum(variance, most * 2.0**-20)
    deviation, size = jnp.sqrt(floored), 1 / variance.shape[-1]
    mean = alone(tree_sum(deviation, -1) * size)
    uneven = alone(tree_sum(floored, -1) * size) > alone(alone(mean * mean) * UNEVEN)
    bits = lax.bitcast_convert_type(floored, jnp.int32) >> 2
    total = jnp.sum(bits >> 10, axis=-1, keepdims=True, dtype=jnp.int32)
    middle = total // variance.shape[-1] << 10
    return jnp.where(uneven & (most > 0), bits - middle, 0)


def factor(balance: jax.Array) -> jax.Array:
    """What keys are multiplied by: floats of 4 significant bits; 1 for a balance of 0."""
    return lax.bitcast_convert_type((ONE - balance) & KEPT, jnp.float32)
