"""Partial softmax attention and its exact merge (online softmax; Milakov and Gimelshein 2018, FlashAttention 2022)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

FLOOR = -1e30
"""The least maximum. Finite, so that `exp(-inf - FLOOR)` is 0 and never NaN where nothing is visible."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Partial:
    """Attention over a part of the tokens: `out = sum_s exp(score_s - max) value_s`, `sum = sum_s exp(score_s - max)`."""

    out: jax.Array  # [..., H] float32
    max: jax.Array  # [...] float32, at least FLOOR
    sum: jax.Array  # [...] float32


def empty(shape: tuple[int, ...], head_dim: int) -> Partial:
    """The partial of no tokens; the neutral element of `merge`."""
    return Partial(jnp.zeros((*shape, head_dim)), jnp.full(shape, FLOOR), jnp.zeros(shape))


def merge(partials: Sequence[Partial]) -> Partial:
    """The partial over all tokens of disjoint parts. Order does not matter but for rounding."""
    top = functools.reduce(jnp.maximum, [p.max for p in partials])
    weights = [jnp.exp(p.max - top) for p in partials]
    out = sum((p.out * w[..., None] for p, w in zip(partials, weights, strict=True)), jnp.zeros(()))
    total = sum((p.sum * w for p, w in zip(partials, weights, strict=True)), jnp.zeros(()))
    return Partial(out, top, total)


def normalize(partial: Partial) -> jax.Array:
    """The attention output [..., H]; zeros where nothing was visible."""
    return partial.out / jnp.where(partial.sum > 0, partial.sum, 1)[..., None]


def log_sum_exp(partial: Partial) -> jax.Array:
    """log of the softmax's denominator [...]; -inf where nothing was visible."""
    return partial.max + jnp.log(partial.sum)
