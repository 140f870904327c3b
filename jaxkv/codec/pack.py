"""How codes lie in words: `8 // bits` codes in an int8, by hand.

A word's lowest bits hold the first part of the head dim, its highest bits the last part (`split`).
The highest part is kept in two's complement, `code - 2**(bits - 1)`, so that every part is masked
out of the word as a small signed integer, ready for an integer product and without a shift (x86 has
no byte shift; masking alone halved the time of unpacking).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Packs codes [..., H] (int32, 0 .. 2**bits - 1) into int8 words [..., ceil(H * bits / 8)]; the
    last ones are filled up with zeros."""
    count = 8 // bits
    lacking = -codes.shape[-1] % count
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, lacking)]) if lacking else codes
    *low, top = jnp.split(codes, count, axis=-1)
    word = (top - 2 ** (bits - 1)) << (bits * (count - 1))
    for index, part in enumerate(low):
        word = word | (part << (bits * index))
    return word.astype(jnp.int8)


def split(words: jax.Array, bits: int) -> list[tuple[jax.Array, float]]:
    """The parts of packed words [...]: int8 arrays [...] and the weight that turns each into codes.

    Part i of W words holds elements [i * W, (i + 1) * W) of the head dim; `part * weight` is the
    code, for the last part the code minus `2**(bits - 1)`.
    """
    count = 8 // bits
    masks = [(2**bits - 1) << (bits * i) for i in range(count - 1)]
    parts = [(words & jnp.int8(mask), 2.0 ** (-bits * i)) for i, mask in enumerate(masks)]
    top = words & jnp.int8(-(2 ** (bits * (count - 1)))) if count > 1 else words
    return [*parts, (top, 2.0 ** (-bits * (count - 1)))]


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack`: codes [..., W * 8 // bits] int32, with what filled up the last
    words."""
    count = 8 // bits
    wide = words.astype(jnp.int32)
    low = [(wide >> (bits * i)) & (2**bits - 1) for i in range(count - 1)]
    top = (wide >> (bits * (count - 1))) + 2 ** (bits - 1)
    return jnp.concatenate([*low, top], axis=-1)
