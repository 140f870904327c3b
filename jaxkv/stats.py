"""What a cache holds, in tokens and bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.chain import TierSpec
from jaxkv.config import KvCacheConfig
from jaxkv.state import CacheState, segments
from jaxkv.tiers import tokens
from jaxkv.trees import node


@node
@dataclasses.dataclass(frozen=True)
class KvCacheStats:
    """What is held now. Token counts are int32 [B] (or [L, B]); bytes and ratio are float32 over
    all rows and layers.

    `tail_bytes` and `store_bytes` are the device's bytes behind the tokens held (sinks count as
    tail, warm as store); `compression_ratio` is the size of the same tokens in fp16 over the sum of
    both, 1 when nothing is held.
    """

    total_tokens: Any
    tail_tokens: Any
    store_tokens: Any
    tail_bytes: Any
    store_bytes: Any
    compression_ratio: Any
    sink_tokens: Any
    warm_tokens: Any


def stats(state: CacheState) -> KvCacheStats:
    """Counts and bytes of the tokens held now."""
    tokens_of = dict.fromkeys(("sinks", "hot", "warm", "cold"), jnp.zeros_like(state.end))
    bytes_of = dict.fromkeys(tokens_of, jnp.float32(0))
    for part in segments(state):
        tokens_of[part.spec.name] = part.count()
        held = part.count().astype(jnp.float32)  # int32 would not hold their sum
        bytes_of[part.spec.name] = held.sum() * bytes_per_token(state.config, part.spec)
    total = sum(tokens_of.values(), jnp.zeros_like(state.end))
    tail, store = bytes_of["sinks"] + bytes_of["hot"], bytes_of["warm"] + bytes_of["cold"]
    fp16 = total.astype(jnp.float32).sum() * (
        2.0 * state.config.num_kv_heads * sum(state.config.side_dims)
    )
    ratio = jnp.where(fp16 > 0, fp16 / jnp.maximum(tail + store, 1.0), 1.0)
    return KvCacheStats(
        total,
        tokens_of["hot"],
        tokens_of["cold"],
        tail,
        store,
        ratio,
        tokens_of["sinks"],
        tokens_of["warm"],
    )


def bytes_per_token(config: KvCacheConfig, spec: TierSpec) -> float:
    """Device bytes of one token of one layer in a tier: codes, scales and zero points of keys and
    values."""
    halves = [
        tokens.shapes(fmt, config.num_kv_heads, spec.capacity, dim)
        for fmt, dim in zip(spec.formats, config.side_dims, strict=True)
    ]
    arrays = jax.tree.leaves([tokens.without_basis(half) for half in halves])
    return float(sum(array.size * array.dtype.itemsize for array in arrays)) / spec.capacity


def nbytes(state: CacheState) -> int:
    """Bytes that the state's arrays take on their device(s), positions included."""
    return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(state))
