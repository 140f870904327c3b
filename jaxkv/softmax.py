"""Partial softmax attention and its exact merge (online softmax; Milakov and Gimelshein 2018,
FlashAttention 2022)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxkv.trees import node

FLOOR = float(np.finfo(np.float32).min)
"""The least maximum, no larger than any finite score. Finite itself, so that `exp(-inf - FLOOR)` is
0 and never NaN where nothing is visible."""

MOST_SCORE = 2.0**125
"""The largest magnitude of a score, of a bias and of a decay: the sum of all three is finite. Minus
infinity is for what is hidden, and nothing else."""


def bounded(scores: jax.Array) -> jax.Array:
    """Scores within +-`MOST_SCORE`, also where a product has overflowed."""
    return jnp.clip(scores, -MOST_SCORE, MOST_SCORE)


@node
@dataclasses.dataclass(frozen=True)
class Partial:
    """Attention over a part of the tokens: `out = sum_s exp(score_s - max) value_s`, `sum = sum_s
    exp(score_s - max)`."""

    out: jax.Array  # [..., H] float32
    max: jax.Array  # [...] float32, at least FLOOR
    sum: jax.Array  # [...] float32


def empty(shape: tuple[int, ...], head_dim: int) -> Partial:
    """The partial of no tokens; the neutral element of `merge`."""
    out, top = jnp.zeros((*shape, head_dim), jnp.float32), jnp.full(shape, FLOOR, jnp.float32)
    return Partial(out, top, jnp.zeros_like(top))


def merge(partials: Sequence[Partial]) -> Partial:
    """The partial over all tokens of disjoint parts. Order does not matter but for rounding."""
    top = functools.reduce(jnp.maximum, [p.max for p in partials])
    weights = [jnp.exp(p.max - top) for p in partials]
    weighed = [(p.out * w[..., None], p.sum * w) for p, w in zip(partials, weights, strict=True)]
    out, total = (functools.reduce(jnp.add, parts) for parts in zip(*weighed, strict=True))
    return Partial(out, top, total)


GATHERED = 2**20
"""The elements of all devices' outputs up to which `merge_over` takes one exchange."""


def merge_over(axis: str, partial: Partial) -> Partial:
    """The partial over all tokens that the devices along a mesh axis hold; inside `jax.shard_map`,
    the same on all of them.

    A decode step's take one exchange, all side by side: between CPU devices any costs 0.07 ms.
    Larger ones take two, of their own size.
    """
    parts = lax.axis_size(axis)
    if parts * partial.out.size > GATHERED:
        top = lax.pmax(partial.max, axis)
        weight = jnp.exp(partial.max - top)
        out, total = lax.psum((partial.out * weight[..., None], partial.sum * weight), axis)
        return Partial(out, top, total)
    packed = jnp.concatenate([partial.out, partial.max[..., None], partial.sum[..., None]], axis=-1)
    place = jnp.arange(parts, dtype=jnp.int32).reshape(-1, *[1] * packed.ndim)
    every = lax.psum(jnp.where(place == lax.axis_index(axis), packed[None], 0.0), axis)
    return merge([Partial(one[..., :-2], one[..., -2], one[..., -1]) for one in every])


def normalize(partial: Partial) -> jax.Array:
    """The attention output [..., H]; zeros where nothing was visible."""
    return partial.out / jnp.where(partial.sum > 0, partial.sum, 1)[..., None]


def log_sum_exp(partial: Partial) -> jax.Array:
    """log of the softmax's denominator [...]; -inf where nothing was visible."""
    return partial.max + jnp.log(partial.sum)


def merge_outputs(
    outs: Sequence[jax.Array], lses: Sequence[jax.Array], sink_logits: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """Attention over all tokens from attention over disjoint parts of them, as `attend` gives it
    with `return_lse=True`.

    Args:
      outs: each [..., N, H]. lses: each [..., N], -inf where the part showed nothing; whatever the
        output is there.
      sink_logits: [N], the learned logits, counted once here, and so not given to the parts.

    Returns:
      The output, in the first one's dtype, and its log-sum-exp, float32; zeros and -inf where no
      part showed anything.

    Raises:
      ValueError: no parts, or shapes that do not go together.
    """
    shapes = [(jnp.shape(out), jnp.shape(lse)) for out, lse in zip(outs, lses, strict=False)]
    if (
        len(outs) != len(lses)
        or not outs
        or any((out, lse) != (shapes[0][0], shapes[0][0][:-1]) for out, lse in shapes)
    ):
        raise ValueError(
            f"{len(outs)} outs and {len(lses)} lses of shapes {shapes}: must be as many, at least "
            "one, [..., N, H] and [..., N] alike"
        )
    parts = []
    for out, lse in zip(outs, lses, strict=True):
        top = jnp.asarray(lse, jnp.float32)
        seen = top > -jnp.inf
        out = jnp.where(seen[..., None], jnp.asarray(out, jnp.float32), 0)
        parts.append(Partial(out, jnp.where(seen, top, FLOOR), seen.astype(jnp.float32)))
    if sink_logits is not None:
        if jnp.shape(sink_logits) != parts[0].max.shape[-1:]:
            raise ValueError(
                f"sink_logits has shape {jnp.shape(sink_logits)}: must be [N] = "
                f"[{parts[0].max.shape[-1]}]"
            )
        logits = jnp.broadcast_to(jnp.asarray(sink_logits, jnp.float32), parts[0].max.shape)
        parts.append(Partial(jnp.zeros_like(parts[0].out), logits, jnp.ones_like(logits)))
    merged = merge(parts)
    return normalize(merged).astype(jnp.asarray(outs[0]).dtype), log_sum_exp(merged)
