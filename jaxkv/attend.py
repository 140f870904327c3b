"""Attention over the chain of tiers: a partial result per tier, merged exactly."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxkv import softmax
from jaxkv.checks import as_counts, check_layer, check_query
from jaxkv.config import Precision, TierSpec
from jaxkv.kernels import xla
from jaxkv.softmax import Partial
from jaxkv.state import CacheState, Segment, Tier, segments
from jaxkv.tokens import Index, Tokens

QUERY_BLOCK = 128
"""Queries attended at once; longer prompts are mapped over blocks so that scores stay small."""


def attend(
    state: CacheState,
    query: jax.Array,
    scale: ArrayLike | None = None,
    *,
    lengths: ArrayLike | None = None,
    layer: Index = None,
) -> jax.Array:
    """Attention of the newest tokens' queries over all tokens held, causal among the newest.

    Args:
      query: [B, T, N, H] of the T tokens appended last (N a multiple of K); any float dtype, computed in float32.
      scale: of the scores; default H**-0.5.
      lengths: [B], as given to the append: row b's queries are its first lengths[b]; the others' outputs are zeros.
      layer: required where the state has layers; int or traced.

    Returns:
      [B, T, N, H] in the query's dtype. A query that sees no token gives zeros.
    """
    check_layer(layer, state.num_layers)
    config = state.config
    check_query(query, state.batch_size, config.num_kv_heads, config.head_dim)
    count = as_counts("lengths", lengths, state.batch_size, query.shape[1])
    end = state.end if layer is None else state.end[layer]
    position = (end - count)[:, None] + jnp.arange(query.shape[1], dtype=jnp.int32)
    position = jnp.where(position < end[:, None], position, -1)
    partial = over_segments(segments(state, layer), query, position, scale, layer)
    return unfold(softmax.normalize(partial), query)


def over_segments(
    parts: list[Segment], query: jax.Array, position: jax.Array, scale: ArrayLike | None, layer: Index
) -> Partial:
    """The merged Partial [B, K, G * T] of queries [B, T, N, H] at `position` [B, T]; -1 sees nothing."""
    heads = parts[0].tier.keys.data.shape[-3]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    size = query.shape[1]

    def some(query: jax.Array, position: jax.Array) -> Partial:
        folded = fold(query.astype(jnp.float32) * factor, heads)

        def causal(key_position: jax.Array) -> jax.Array:
            return key_position[:, None] <= position[..., None]  # [B, T, S]

        newest = position.max(-1)
        return softmax.merge([xla.partial_attention(p, folded, causal, newest, layer) for p in parts])

    if size <= QUERY_BLOCK:
        return some(query, position)
    blocks = -(-size // QUERY_BLOCK)
    pad = blocks * QUERY_BLOCK - size
    queries = jnp.pad(query, ((0, 0), (0, pad), (0, 0), (0, 0)))
    positions = jnp.pad(position, ((0, 0), (0, pad)), constant_values=-1)
    split = [jnp.moveaxis(a.reshape(a.shape[0], blocks, QUERY_BLOCK, *a.shape[2:]), 1, 0) for a in (queries, positions)]
    mapped = lax.map(lambda block: some(*block), tuple(split))
    return jax.tree.map(lambda a: _joined(a, size), mapped)


def _joined(blocks: jax.Array, size: int) -> jax.Array:
    """[blocks, B, K, G * QUERY_BLOCK, ...] as [B, K, G * size, ...]."""
    _, b, k, rows, *rest = blocks.shape
    by_query = jnp.moveaxis(blocks.reshape(-1, b, k, rows // QUERY_BLOCK, QUERY_BLOCK, *rest), 0, 3)
    return by_query.reshape(b, k, rows // QUERY_BLOCK, -1, *rest)[:, :, :, :size].reshape(b, k, -1, *rest)


def fold(query: jax.Array, heads: int) -> jax.Array:
    """[B, T, N, H] as [B, K, G * T, H]: the queries that share a kv head together."""
    b, t, n, h = query.shape
    return jnp.moveaxis(query.reshape(b, t, heads, n // heads, h), 1, 3).reshape(b, heads, -1, h)


def unfold(out: jax.Array, query: jax.Array) -> jax.Array:
    """[B, K, G * T, H] as [B, T, N, H], in the query's dtype."""
    b, t, n, h = query.shape
    return jnp.moveaxis(out.reshape(b, out.shape[1], -1, t, h), 3, 1).reshape(b, t, n, h).astype(query.dtype)


def raw_segment(keys: jax.Array, values: jax.Array, count: jax.Array) -> Segment:
    """The first `count` [B] of tokens [B, T, K, H] that no tier holds, at positions counted from the first of them."""
    size = keys.shape[1]
    spec = TierSpec("raw", size, size, 0, Precision.FP32, Precision.FP32)
    tier = Tier(*(Tokens(jnp.swapaxes(x, 1, 2)) for x in (keys, values)))
    return Segment(tier, spec, jnp.zeros_like(count), count)
