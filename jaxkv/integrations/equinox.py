"""Equinox: a cache of one row as a module, used like every Equinox module: without a batch axis,
with `eqx.filter_vmap` over rows, `eqx.filter_jit`, and `eqx.tree_serialise_leaves`."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax

import jaxkv


class KvCache(eqx.Module):
    """One row's cache."""

    state: jaxkv.CacheState
    options: dict[str, Any] = eqx.field(static=True)

    def __init__(self, config: jaxkv.KvCacheConfig, **options: Any) -> None:
        """`options` as for `attend`: window, soft_cap, ..."""
        self.state = jaxkv.init(config)
        self.options = options

    def extend(
        self, query: jax.Array, keys: jax.Array, values: jax.Array
    ) -> tuple[KvCache, jax.Array]:
        """Queries and outputs [T, N, H], keys and values [T, K, H]."""
        row = (x[None] for x in (query, keys, values))
        state, out = jaxkv.extend(self.state, *row, **self.options)
        return eqx.tree_at(lambda cache: cache.state, self, state), out[0]


class CachedAttention(eqx.Module):
    """`eqx.nn.MultiheadAttention` that remembers: its weights, causal, without dropout."""

    attention: eqx.nn.MultiheadAttention

    def __call__(self, x: jax.Array, cache: KvCache) -> tuple[jax.Array, KvCache]:
        """x [T, D] -> outputs [T, D], and the cache with them."""
        inner = self.attention
        query, keys, values = (
            jax.vmap(project)(x).reshape(len(x), inner.num_heads, -1)
            for project in (inner.query_proj, inner.key_proj, inner.value_proj)
        )
        cache, out = cache.extend(query, keys, values)
        return jax.vmap(inner.output_proj)(out.reshape(len(x), -1)), cache
