"""The rotary embedding in arithmetic that gives the same bits in every program: what is taken out
of a key before it is quantized depends on its position alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.codec.arithmetic import alone
from jaxkv.rotary import Rotary

SINE = (0.78539816, -0.080745512, 0.0024903946, -3.6576204e-05)
COSINE = (1.0, -0.30842514, 0.015854344, -0.00032599189, 3.5908604e-06)
"""Taylor's coefficients of sin and cos of x quarter-pis, by powers of x * x."""


def cos_sin(position: jax.Array, turns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """position [...] int32, turns [F] uint32 (`Rotary.turns`) -> cosines and sines [..., F]
    float32, to 2**-21."""
    each = turns.reshape((1,) * position.ndim + turns.shape)
    angle = position.astype(jnp.uint32)[..., None] * each
    quadrant = (angle + jnp.uint32(2**29)) >> 30
    rest = lax.bitcast_convert_type(angle - (quadrant << 30), jnp.int32)
    x = rest.astype(jnp.float32) * 2.0**-29
    square = alone(x * x)
    sine, cosine = alone(x * _polynomial(SINE, square)), _polynomial(COSINE, square)
    swaps = (quadrant & 1) > 0
    cos, sin = jnp.where(swaps, sine, cosine), jnp.where(swaps, cosine, sine)
    return (
        jnp.where((quadrant == 1) | (quadrant == 2), -cos, cos),
        jnp.where(quadrant >= 2, -sin, sin),
    )


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    *rest, total = coefficients
    value = jnp.full_like(x, total)
    for coefficient in reversed(rest):
        value = alone(value * x) + coefficient
    return value


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array, rotary: Rotary) -> jax.Array:
    """x [..., H] turned by angles [..., F]; by `-sin`, turned back."""
    a, b, rest = pairs(x, rotary)
    turned = alone(a * cos) - alone(b * sin), alone(a * sin) + alone(b * cos)
    dim = 2 * cos.shape[-1]
    if rotary.pairing == "halves":
        joined = jnp.concatenate(turned, axis=-1)
    else:
        joined = jnp.stack(turned, axis=-1).reshape(*turned[0].shape[:-1], dim)
    rest = jnp.broadcast_to(rest, (*joined.shape[:-1], rest.shape[-1]))
    return jnp.concatenate([joined, rest], axis=-1)


def pairs(x: jax.Array, rotary: Rotary) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first and second elements [..., F] of the pairs of x [..., H], and what does not turn."""
    dim = rotary.dim_of(x.shape[-1])
    head, rest = x[..., :dim], x[..., dim:]
    if rotary.pairing == "halves":
        return head[..., : dim // 2], head[..., dim // 2 :], rest
    return head[..., ::2], head[..., 1::2], rest
