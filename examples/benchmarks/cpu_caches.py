"""Caches of random codes for the CPU benchmark: on one device, and on a device for every core."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

import jaxkv
from jaxkv import KvCacheConfig, shards
from jaxkv.sharding import Axes

CACHES: dict[str, dict[str, Any]] = {
    "Q8": {"store_precision": "q8"},
    "Q4": {},
    "Q2": {"store_precision": "q2"},
    "BF16": {"tail_precision": "bf16", "store_precision": "bf16"},
}


def noise_like(tree: Any) -> Any:
    """Random codes, random numbers of attention's size, and small scales, laid out as `tree` is."""
    rng = np.random.default_rng(0)

    def noise(a: jax.Array) -> jax.Array:
        if a.dtype == jnp.int16:  # the bits of bfloat16
            random = np.asarray(rng.standard_normal(a.shape), jnp.bfloat16).view(np.int16)
        elif jnp.issubdtype(a.dtype, jnp.integer):
            random = rng.integers(-100, 100, a.shape).astype(a.dtype)
        else:
            random = rng.uniform(0.01, 0.1, a.shape).astype(a.dtype)
        return jax.device_put(random, a.sharding)

    return jax.tree.map(noise, tree)


def filled(config: KvCacheConfig, held: np.ndarray) -> jaxkv.CacheState:
    """A cache that holds `held` [B] tokens."""
    state = jaxkv.init(config, len(held))
    return dataclasses.replace(
        state, tiers=noise_like(state.tiers), end=jnp.asarray(held, jnp.int32)
    )


def on_cores(
    config: KvCacheConfig, held: np.ndarray, query: jax.Array, cores: int, axes: Axes | None = None
) -> Callable[[], Any]:
    """A call of `attend` on a cache dealt out over `cores` devices: its heads, or its positions
    where there is one."""
    axes = axes or (
        Axes(heads="core") if config.num_kv_heads % cores == 0 else Axes(context="core")
    )
    mesh = jax.make_mesh((cores,), ("core",), axis_types=(AxisType.Auto,))
    empty = shards.init(config, len(held), mesh=mesh, axes=axes)
    parts = len(empty.cache.end)
    each = (
        held - np.arange(parts)[:, None] + parts - 1
    ) // parts  # how many of the positions 0, 1, ... fall to each part
    end, own = (
        jax.device_put(np.asarray(count, np.int32), like.sharding)
        for count, like in ((held, empty.end), (each, empty.cache.end))
    )
    dealt = dataclasses.replace(
        empty,
        cache=dataclasses.replace(empty.cache, tiers=noise_like(empty.cache.tiers), end=own),
        end=end,
    )
    attend = jax.jit(
        jax.shard_map(
            shards.attend, mesh=mesh, in_specs=(dealt.specs, axes.tokens), out_specs=axes.tokens
        )
    )
    query = jax.device_put(query, NamedSharding(mesh, axes.tokens))
    return lambda: attend(dealt, query)
