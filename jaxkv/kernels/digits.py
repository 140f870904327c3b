"""Exact float products on integer units: a float operand as three 7-bit digits, dotted with small
integer codes.

XLA:CPU hands int8 x int8 -> int32 products to VNNI and AMX units, where 12 rows cost little more
than 4: three digits of 4 rows give float32's accuracy at the price of an int8 query's. A query of
one digit, the common choice, would err by 0.4 %.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

DIGITS = 3
BITS = 7


def of_signed(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Floats [..., R, X] as digits [..., 3 R, X] int8 and the unit [..., R, 1] that they count.

    The largest element of a row is 2**20 - 1 units, so that each is off by at most 2**-21 of it.
    """
    most = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    most = jnp.where(most > NOTHING, most, 1.0)
    top = 2.0 ** (DIGITS * BITS - 1) - 1
    return _digits(jnp.round(x * (top / most)).astype(jnp.int32)), most / top


NOTHING = 2.0**-104
"""Rows of no larger element count as zeros: what is made of them would leave float32's range."""

FRACTION_UNIT = 2.0 ** -(DIGITS * BITS)


def of_positive(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Floats [..., R, X] >= 0 as digits [..., 3 R, X] int8 and the unit [..., R, 1] that they
    count, 2**-21 of a row's largest."""
    most = jnp.max(x, axis=-1, keepdims=True)
    per = jnp.where(most > NOTHING, (1 - FRACTION_UNIT) / jnp.maximum(most, NOTHING), 0.0)
    # y + 4 has 2**-21 as its last mantissa bit: its bits are the fixed-point number, without XLA's
    # guarded float-to-int conversion.
    fixed = lax.bitcast_convert_type(x * per + 4.0, jnp.int32)
    return _digits(fixed & (2 ** (DIGITS * BITS) - 1)), most * (FRACTION_UNIT / (1 - FRACTION_UNIT))


def _digits(fixed: jax.Array) -> jax.Array:
    def digit(index: int) -> jax.Array:
        shifted = fixed >> (BITS * index)
        return (shifted & (2**BITS - 1) if index < DIGITS - 1 else shifted).astype(jnp.int8)

    return stacked([digit(index) for index in range(DIGITS)])


def stacked(parts: list[jax.Array]) -> jax.Array:
    """Arrays [..., R, X] one below the other. Writes in place are vectorized; a concatenation is
    computed element by element."""
    rows = parts[0].shape[-2]
    out = jnp.zeros((*parts[0].shape[:-2], len(parts) * rows, parts[0].shape[-1]), parts[0].dtype)
    for index, part in enumerate(parts):
        out = out.at[..., index * rows : (index + 1) * rows, :].set(part)
    return out


def join(products: jax.Array) -> jax.Array:
    """Products of digits [..., 3 R, X] int32 as floats [..., R, X] in units."""
    rows = products.shape[-2] // DIGITS
    parts = [products[..., i * rows : (i + 1) * rows, :].astype(jnp.float32) for i in range(DIGITS)]
    return parts[0] + parts[1] * 2.0**BITS + parts[2] * 2.0 ** (2 * BITS)


def dot(digits: jax.Array, codes: jax.Array, contract: int) -> jax.Array:
    """Digits [..., R3, X] times int8 codes [..., S, X] (contract=-1) or [..., X, S] (contract=-2)
    -> [..., R, S] floats in units."""
    batch = tuple(range(digits.ndim - 2))
    dims = (((digits.ndim - 1,), (codes.ndim + contract,)), (batch, batch))
    return join(lax.dot_general(digits, codes, dims, preferred_element_type=jnp.int32))


def dot_rows(rows: jax.Array, codes: jax.Array, contract: int) -> jax.Array:
    """`dot` of n sets of digits [B, K, n, 3 R, X] with the same codes [B, K, S, X] (or [B, K, X,
    S]) -> [B, K, n, R, S]."""
    b, k, n, r, x = rows.shape
    batch = ((0, 1), (0, 1))
    products = lax.dot_general(
        rows.reshape(b, k, n * r, x),
        codes,
        (((3,), (4 + contract,)), batch),
        preferred_element_type=jnp.int32,
    )
    return join(products.reshape(b, k, n, r, -1))
