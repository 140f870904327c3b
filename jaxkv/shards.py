"""A cache dealt out over the devices of a mesh, for use inside `jax.shard_map`: rows, kv heads, and
positions.

Of the C devices along the context axis, number c holds the positions p with p % C == c, in a
complete smaller cache where p is position p // C. All devices are then equally full at any time;
tokens migrate and are evicted without leaving their device; and every tier of the whole holds the
tokens that it would hold on one device (batched migration: each device's boundary, less than a
batch apart). An `attend` runs over each device's own tokens and merges the partial results once
(`softmax.merge_over`), the only communication there is. (vLLM's decode context parallelism deals
out positions in the same way.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxkv import drop, softmax, update
from jaxkv.attend import (
    check_room,
    finish,
    raw_segments,
    scoring_of,
    seen_singly,
)
from jaxkv.checks import as_counts, as_layer, check_new_tokens, check_query, in_range
from jaxkv.dealing import Deal, Shards, clear, concatenate, gather, init, stats
from jaxkv.kernels.dispatch import Implementation
from jaxkv.kernels.segments import Parts, over_segments
from jaxkv.scoring import Scoring
from jaxkv.softmax import Partial
from jaxkv.state import CacheState, segments
from jaxkv.status import Status, flagged
from jaxkv.tiers.place import Index
from jaxkv.tiers.segment import Segment

__all__ = [
    "Shards",
    "append",
    "attend",
    "clear",
    "concatenate",
    "evict",
    "gather",
    "init",
    "prefill",
    "rewind",
    "stats",
]


def append(
    shards: Shards,
    keys: jax.Array,
    values: jax.Array | None,
    lengths: ArrayLike | None = None,
    *,
    layer: Index = None,
) -> Shards:
    """`jaxkv.append`. Tokens are split by `Axes.tokens`, lengths by `Axes.rows`; of what it gets, a
    device keeps its own positions."""
    deal = Deal.of(shards)
    layer, exists = as_layer(layer, deal.cache.num_layers)
    config = deal.cache.config
    sides = check_new_tokens(
        keys, values, deal.cache.batch_size, config.num_kv_heads, config.side_dims
    )
    given = as_counts("lengths", lengths, deal.cache.batch_size, keys.shape[1])
    count = in_range(given, keys.shape[1], exists)
    end = shards.end if layer is None else shards.end[layer]
    own = deal.below(end + count) - deal.below(end)
    parts = [deal.own(side, end) for side in sides]
    values = parts[1] if len(parts) > 1 else None
    cache = update.append(deal.cache, parts[0], values, own, layer=layer)
    if lengths is not None or exists is not True:
        refused = flagged(cache.refused, given != count, Status.OUT_OF_RANGE, layer)
        cache = dataclasses.replace(cache, refused=refused)
    return _dealt(
        shards, cache, end + count if layer is None else shards.end.at[layer].set(end + count)
    )


def attend(
    shards: Shards,
    query: jax.Array,
    scale: ArrayLike | None = None,
    *,
    lengths: ArrayLike | None = None,
    layer: Index = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """`jaxkv.attend`. The query is split by `Axes.tokens`, options per row and per head alike."""
    deal = Deal.of(shards)
    layer, exists = as_layer(layer, deal.cache.num_layers)
    count = in_range(
        as_counts("lengths", lengths, deal.cache.batch_size, query.shape[1]), query.shape[1], exists
    )
    end = shards.end if layer is None else shards.end[layer]
    first = (
        end - count if options.get("causal", True) else jnp.maximum(end - count, 0)
    )  # more queries than tokens see all of these
    attention = _Attention.of(deal, query, first, count, scale, options)
    causal, size = attention.scoring.causal, attention.query.shape[1]
    check_room(deal.cache.config, attention.scoring, size, deal.parts)

    def held(position: jax.Array) -> list[Segment]:
        as_of = deal.below(position + 1) if causal and size > 1 else None
        return segments(deal.cache, layer, as_of)

    return attention.merged([attention.over(held)], return_lse)


def prefill(
    shards: Shards,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array | None,
    lengths: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    layer: Index = None,
    return_lse: bool = False,
    **options: Any,
) -> tuple[Shards, Any]:
    """`jaxkv.prefill`. Each device attends to its own part of the raw tokens too."""
    deal = Deal.of(shards)
    after = append(shards, keys, values, lengths, layer=layer)
    if keys.shape[1] == 1:
        options |= {"scale": scale, "lengths": lengths, "layer": layer, "return_lse": return_lse}
        return after, attend(after, query, **options)
    layer, exists = as_layer(layer, deal.cache.num_layers)
    count = in_range(
        as_counts("lengths", lengths, deal.cache.batch_size, keys.shape[1]), keys.shape[1], exists
    )
    end = shards.end if layer is None else shards.end[layer]
    first, stop = deal.below(end), deal.below(end + count)
    config = deal.cache.config
    sides = tuple(deal.own(side, end) for side in (keys, values) if side is not None)
    new = raw_segments(config, sides, stop - first, first)
    attention = _Attention.of(deal, query, end, count, scale, options)

    def seen(at: jax.Array) -> list[Segment]:
        parts = [*segments(deal.cache, layer), *new]
        return [seen_singly(config, part, deal.below(at + 1)) for part in parts]

    return after, attention.merged([attention.over(seen)], return_lse)


def evict(shards: Shards, count: ArrayLike) -> Shards:
    """`jaxkv.evict`; a row that any device refuses stays as it was on all."""
    deal = Deal.of(shards)
    begin = deal.total(deal.cache.begin)
    count = as_counts("count", count, deal.cache.batch_size, None)
    return _drop(
        shards, deal, drop.evict, deal.below(begin + count) - deal.below(begin), shards.end
    )


def rewind(shards: Shards, count: ArrayLike) -> Shards:
    """`jaxkv.rewind`; a row that any device refuses stays as it was on all."""
    deal = Deal.of(shards)
    end = shards.end - as_counts("count", count, deal.cache.batch_size, None)
    return _drop(shards, deal, drop.rewind, deal.below(shards.end) - deal.below(end), end)


def _drop(
    shards: Shards, deal: Deal, verb: Callable[..., CacheState], count: jax.Array, end: jax.Array
) -> Shards:
    """The shards after `verb` with `count` [B] or [L, B] on this device, in rows where all devices
    agree."""
    fresh = dataclasses.replace(deal.cache, refused=jnp.zeros_like(deal.cache.refused))
    after = (verb if end.ndim == 1 else jax.vmap(verb))(fresh, count)
    status = after.refused if deal.axis is None else lax.pmax(after.refused, deal.axis)
    refused = status > 0
    lost = jnp.where(refused[..., None], deal.cache.lost, after.lost)
    local_end = jnp.where(refused, deal.cache.end, after.end)
    cache = dataclasses.replace(
        deal.cache, end=local_end, lost=lost, refused=deal.cache.refused | status
    )
    return _dealt(shards, cache, jnp.where(refused, shards.end, end))


def _dealt(shards: Shards, cache: CacheState, end: jax.Array) -> Shards:
    return dataclasses.replace(shards, cache=jax.tree.map(lambda leaf: leaf[None], cache), end=end)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Dealt(Scoring):
    """Scoring of keys that are given by their position on this device."""

    deal: Deal

    def reach(self, query: jax.Array, sink_tokens: int) -> tuple[jax.Array, jax.Array]:
        oldest, newest = super().reach(query, sink_tokens)
        return self.deal.below(oldest), newest

    def visible(self, query: jax.Array, key: jax.Array, sink_tokens: int) -> jax.Array:
        return super().visible(query, self._whole(key), sink_tokens * self.deal.parts)

    def adjust(self, scores: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
        return super().adjust(scores, query, self._whole(key))

    def _whole(self, position: jax.Array) -> jax.Array:
        return position * self.deal.parts + self.deal.part


@dataclasses.dataclass(frozen=True)
class _Attention:
    """Attention of queries [B, T, N, H] at `position` [B, T] over what all devices hold."""

    deal: Deal
    query: jax.Array
    position: jax.Array
    scoring: Scoring

    @classmethod
    def of(
        cls,
        deal: Deal,
        query: jax.Array,
        first: jax.Array,
        count: jax.Array,
        scale: ArrayLike | None,
        options: dict[str, Any],
    ) -> _Attention:
        config = deal.cache.config
        query = check_query(query, deal.cache.batch_size, config.num_kv_heads, config.head_dim)
        index = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
        position = jnp.where(index < count[:, None], first[:, None] + index, -1)
        return cls(
            deal,
            query,
            position,
            _Dealt(**vars(scoring_of(config, query, scale, options)), deal=deal),
        )

    def over(self, parts: Parts) -> Partial:
        """Over segments of this device."""
        # The GPU kernel takes positions as they are; dealt out, they are for `_Dealt` to interpret.
        implementation: Implementation = "xla" if self.deal.parts > 1 else None
        sink_tokens = self.deal.cache.config.sink_tokens if self.scoring.window_sinks else 0
        return over_segments(
            parts, self.query, self.position, self.scoring, sink_tokens, implementation
        )

    def merged(self, partials: list[Partial], return_lse: bool) -> Any:
        """Over the tokens of all devices: outputs like the query."""
        merged = softmax.merge(partials)
        if self.deal.axis is not None:
            merged = softmax.merge_over(self.deal.axis, merged)
        return finish([merged], self.scoring, self.query, return_lse)
