"""Orthogonal turns of tokens before they are quantized: the Hadamard transform, and a reflection
that aligns their mean.

The same bits in every program (`arithmetic`), as all that leads to stored codes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxkv.codec.arithmetic import alone, as_float16, halves, quotient, root, tree_sum
from jaxkv.codec.scales import LEAST


def hadamard_block(head_dim: int) -> int:
    """The largest power of two that divides `head_dim`: the size of the blocks that are rotated."""
    return head_dim & -head_dim


def hadamard(x: jax.Array) -> jax.Array:
    """A block-diagonal Hadamard transform of the last axis, Sylvester order, times a power of two.

    The factor is that nearest below `1 / sqrt(block)`, so that it is exact;
    `hadamard(inverse_hadamard(x)) == x` but for rounding. Source: QuaRot (Ashkboos et al. 2024).
    """
    block = hadamard_block(x.shape[-1])
    return _butterfly(x, block) * 2.0 ** -math.ceil(math.log2(block) / 2)


def inverse_hadamard(x: jax.Array) -> jax.Array:
    """The inverse (and, for queries, the transpose of the inverse) of `hadamard`."""
    block = hadamard_block(x.shape[-1])
    return _butterfly(x, block) * 2.0 ** -math.floor(math.log2(block) / 2)


def _butterfly(x: jax.Array, block: int) -> jax.Array:
    """Sums and differences over all bits of an element's index in its block, the highest first;
    each stage moves it to the lowest place."""
    pairs = x.reshape(*x.shape[:-1], -1, block)
    for _ in range(block.bit_length() - 1):
        first, second = jnp.split(pairs, 2, axis=-1)
        pairs = jnp.stack([first + second, first - second], axis=-1).reshape(pairs.shape)
    return pairs.reshape(x.shape)


def mirror_of(mean: jax.Array) -> jax.Array:
    """The vector v [..., H] whose reflection turns the direction of `mean` [..., H] into that of a
    constant vector; 0 for a mean of 0.

    Its elements have 11 significant bits, as `reflect` needs.
    """
    most = jnp.max(jnp.abs(mean), axis=-1, keepdims=True)
    whole = jnp.round(
        mean * quotient(jnp.float32(127), jnp.where(most > LEAST, most, 1.0))
    )  # small integers: sums of their squares are exact
    norm = root(jnp.sum(whole * whole, axis=-1, keepdims=True))
    side = jnp.where(jnp.sum(whole, axis=-1, keepdims=True) < 0, -1.0, 1.0)
    v = quotient(side * whole, jnp.where(norm > 0, norm, 1.0)) - mean.shape[-1] ** -0.5
    return jnp.where(norm > 0, as_float16(v), 0.0)


def reflect(x: jax.Array, v: jax.Array) -> jax.Array:
    """Householder reflection of [..., H] at the plane orthogonal to v [..., H] (as `mirror_of`
    gives it; 0 leaves x as it is).

    Its own inverse but for rounding, and the same bits in every program: factors go in halves of 12
    bits, so that no product is rounded.
    """
    high, low = (tree_sum(half * v, -1) for half in halves(x))
    dot = high + low
    # Clipped so that the product cannot melt into the subtraction by which it is halved.
    first, second = halves(alone(_per_square(v) * dot))
    return x - v * first - v * second


def _per_square(v: jax.Array) -> jax.Array:
    square = tree_sum(v * v, -1)
    return jnp.where(square > 0, quotient(jnp.float32(2), jnp.where(square > 0, square, 1.0)), 0.0)
