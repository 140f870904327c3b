"""How codes lie in words, int8, by hand.

Words of 8, 4 and 2 bits hold `8 // bits` codes. A word's lowest bits hold the first part of the
head dim, its highest bits the last part (`split`). The highest part is kept in two's complement,
`code - 2**(bits - 1)`, so that every part is masked out of the word as a small signed integer,
ready for an integer product and without a shift (x86 has no byte shift; masking alone halved the
time of unpacking).

Codes of 3 bits are two planes: words of the two low bits, and behind them half as many words of the
third, which is a sign: `code - 4` in two's complement. Part i of the first plane and bits 2 i and
2 i + 1 of the second make part i of the codes, again small signed integers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Packs codes [..., H] (int32, 0 .. 2**bits - 1) into int8 words [..., W]; the last ones are
    filled up with zeros."""
    lacking = -codes.shape[-1] % (8 if bits == 3 else 8 // bits)
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, lacking)]) if lacking else codes
    if bits == 3:
        planes = _interleaved(codes & 3, 2), _interleaved((codes >> 2) ^ 1, 1)
        return jnp.concatenate(planes, axis=-1).astype(jnp.int8)
    half = 1 << 7  # the top part's highest bit, in the word
    return ((_interleaved(codes, bits) ^ half) << 24 >> 24).astype(jnp.int8)


def _interleaved(codes: jax.Array, bits: int) -> jax.Array:
    """Codes [..., H] as words [..., H * bits / 8] int32, the last part in the highest bits."""
    word, *others = jnp.split(codes, 8 // bits, axis=-1)
    for index, part in enumerate(others, 1):
        word = word | (part << (bits * index))
    return word


def _apart(words: jax.Array, bits: int) -> jax.Array:
    """The inverse of `_interleaved`."""
    parts = [(words >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    return jnp.concatenate(parts, axis=-1)


def planes(words: jax.Array, bits: int, width: int) -> list[jax.Array]:
    """Packed words [..., S * W] as what `split` takes, flat arrays [..., S * width]: as they are;
    of 3 bits the two planes, the signs spread over as many bytes as the rest."""
    if bits != 3:
        return [words]
    rows = words.reshape(*words.shape[:-1], -1, 3, width // 2)
    low, sign = rows[..., :2, :], rows[..., 2, :]
    signs = jnp.stack([sign, sign >> 1], axis=-2)  # of a part, bit 2 i and bit 2 i + 1
    return [x.reshape(*words.shape[:-1], -1) for x in (low, signs)]


def split(flat: list[jax.Array], bits: int) -> list[tuple[jax.Array, float]]:
    """The parts of packed words (`planes`): int8 arrays [..., S * width], `width` elements of each
    head, and the weight that turns each into codes.

    Part i holds elements [i * width, (i + 1) * width) of the head dim; `part * weight` is the code,
    for the last part (3 bits: every part) the code minus `2**(bits - 1)`.
    """
    if bits == 3:
        return _signed(*flat)
    (words,), count = flat, 8 // bits
    masks = [(2**bits - 1) << (bits * i) for i in range(count - 1)]
    parts = [(words & jnp.int8(mask), 2.0 ** (-bits * i)) for i, mask in enumerate(masks)]
    top = words & jnp.int8(-(2 ** (bits * (count - 1)))) if count > 1 else words
    return [*parts, (top, 2.0 ** (-bits * (count - 1)))]


def _signed(low: jax.Array, signs: jax.Array) -> list[tuple[jax.Array, float]]:
    """`split` of 3 bits."""
    parts = []
    for index, at in enumerate((0, 2, 4, 5)):
        if at == 5:  # one bit lower, where the sign still fits into a byte
            low = (low >> 1) & jnp.int8(0x7F)
        negative = jnp.where(signs & jnp.int8(1 << 2 * index) != 0, jnp.int8(-(4 << at)), 0)
        parts.append(((low & jnp.int8(3 << at)) | negative.astype(jnp.int8), 2.0**-at))
    return parts


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack`: codes [..., W * 8 // bits] int32, with what filled up the last
    words."""
    wide = words.astype(jnp.int32)
    if bits == 3:
        low, sign = jnp.split(wide, [2 * (words.shape[-1] // 3)], axis=-1)
        return _apart(low, 2) | (_apart(sign, 1) ^ 1) << 2
    return _apart(wide ^ (1 << 7), bits)
