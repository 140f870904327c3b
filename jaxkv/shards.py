"""A cache dealt out over the devices of a mesh, for use inside `jax.shard_map`: rows, kv heads, and
positions.

Of the C devices along the context axis, number c holds the positions p with p % C == c, in a
complete smaller cache where p is position p // C. All devices are then equally full at any time;
tokens migrate and are evicted without leaving their device; and every tier of the whole holds the
tokens that it would hold on one device (batched migration: each device's boundary, less than a
batch apart). An `attend` runs over each device's own tokens and merges the partial results once
(`softmax.merge_over`), the only communication there is but for a flag where full rows are to be
refused. (vLLM's decode context parallelism deals
out positions in the same way.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxkv import drop, update
from jaxkv.attend import check_room, raw_segments, seen_singly
from jaxkv.checks import as_counts, as_layer, check_either, check_new_tokens, in_range
from jaxkv.dealing import Deal, Shards, clear, concatenate, gather, init, stats
from jaxkv.dealt import Asked, Attention
from jaxkv.dealt_files import load, save
from jaxkv.padding import Padding
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
    "extend",
    "gather",
    "init",
    "load",
    "prefill",
    "rewind",
    "save",
    "stats",
]


def append(
    shards: Shards,
    keys: jax.Array,
    values: jax.Array | None,
    lengths: ArrayLike | None = None,
    *,
    valid: ArrayLike | None = None,
    layer: Index = None,
) -> Shards:
    """`jaxkv.append`. Tokens and `valid` are split by `Axes.tokens`, lengths by `Axes.rows`; of
    what it gets, a device keeps its own positions. What is refused, all devices refuse."""
    deal = Deal.of(shards)
    config = deal.cache.config
    sides = check_new_tokens(
        keys, values, deal.cache.batch_size, config.num_kv_heads, config.side_dims
    )
    if valid is not None:
        check_either(lengths, valid)
        padding = Padding.of(valid, deal.cache.batch_size, keys.shape[1])
        sides, lengths = tuple(map(padding.together, sides)), padding.lengths
    count, refused = _taken(shards, deal, lengths, sides[0].shape[1], layer)
    layer, _ = as_layer(layer, deal.cache.num_layers)
    end = shards.end if layer is None else shards.end[layer]
    parts = [deal.own(side, end) for side in sides]
    cache = update.append(
        dataclasses.replace(deal.cache, refused=refused),
        parts[0],
        parts[1] if len(parts) > 1 else None,
        deal.below(end + count) - deal.below(end),
        layer=layer,
    )
    return _dealt(
        shards, cache, end + count if layer is None else shards.end.at[layer].set(end + count)
    )


def _taken(
    shards: Shards, deal: Deal, lengths: ArrayLike | None, size: int, layer: Index
) -> tuple[jax.Array, jax.Array]:
    """How many of `size` new tokens each row takes, [B], the same on all devices; and the status
    bits of what is refused."""
    cache = deal.cache
    layer, exists = as_layer(layer, cache.num_layers)
    given = as_counts("lengths", lengths, cache.batch_size, size)
    count = in_range(given, size, exists)
    end, local, kept = (
        x if layer is None else x[layer] for x in (shards.end, cache.end, cache.kept)
    )
    refused = flagged(cache.refused, given != count, Status.OUT_OF_RANGE, layer)
    beyond = update.beyond(end, count)
    refused = flagged(refused, beyond, Status.OUT_OF_POSITIONS, layer)
    count = jnp.where(beyond, 0, count)
    own = deal.below(end + count) - deal.below(end)
    full = update.overflows(cache.config, local, kept, own)
    if full is None:
        return count, refused
    full = deal.total(full.astype(jnp.int32)) > 0  # one device is, if and only if the whole is
    return jnp.where(full, 0, count), flagged(refused, full, Status.FULL, layer)


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
    return _of_held(shards, lengths, layer, Asked(query, scale, options), return_lse)


def _of_held(
    shards: Shards, lengths: ArrayLike | None, layer: Index, asked: Asked, return_lse: bool
) -> Any:
    """Attention of the newest tokens' queries over all that is held."""
    deal, size = Deal.of(shards), asked.query.shape[1]
    layer, exists = as_layer(layer, deal.cache.num_layers)
    count = in_range(as_counts("lengths", lengths, deal.cache.batch_size, size), size, exists)
    end = shards.end if layer is None else shards.end[layer]
    first = (
        end - count if asked.options.get("causal", True) else jnp.maximum(end - count, 0)
    )  # more queries than tokens see all of these
    attention = Attention.of(deal, asked, first, count)
    causal = attention.scoring.causal
    check_room(deal.cache.config, attention.scoring, size, deal.parts)

    def held(position: jax.Array) -> list[Segment]:
        as_of = deal.below(position + 1) if causal and size > 1 else None
        return segments(deal.cache, layer, as_of)

    return attention.merged([attention.over(held)], return_lse)


def extend(
    shards: Shards,
    query: jax.Array,
    keys: jax.Array | None,
    values: jax.Array | None,
    valid: ArrayLike | None = None,
    *,
    lengths: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    layer: Index = None,
    return_lse: bool = False,
    **options: Any,
) -> tuple[Shards, Any]:
    """`jaxkv.extend`; `valid` is split by `Axes.tokens`. Each device attends to its own part of the
    raw tokens too."""
    check_either(lengths, valid)
    padding = None
    if valid is not None:
        padding = Padding.of(valid, *jnp.shape(query)[:2])
        query, lengths = padding.together(query), padding.lengths
        keys, values = (x if x is None else padding.together(x) for x in (keys, values))
    after, taken = shards, cast(Any, lengths)
    if keys is not None:
        after = append(shards, keys, values, lengths, layer=layer)
        taken, _ = _taken(shards, Deal.of(shards), lengths, keys.shape[1], layer)
    asked = Asked(query, scale, options, padding)
    if keys is None or keys.shape[1] == 1:
        out = _of_held(after, taken, layer, asked, return_lse)
    else:
        sides = tuple(side for side in (keys, values) if side is not None)
        out = _of_prompt(shards, sides, taken, layer, asked, return_lse)
    return after, out if padding is None else jax.tree.map(padding.apart, out)


def prefill(
    shards: Shards,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array | None,
    lengths: ArrayLike | None = None,
    **options: Any,
) -> tuple[Shards, Any]:
    """`extend` with the lengths of the rows."""
    return extend(shards, query, keys, values, lengths=lengths, **options)


def _of_prompt(
    shards: Shards,
    sides: tuple[jax.Array, ...],
    count: jax.Array,
    layer: Index,
    asked: Asked,
    return_lse: bool,
) -> Any:
    """Attention over raw tokens, `count` [B] of each row, and over all that is held without
    them."""
    deal = Deal.of(shards)
    config, (layer, _) = deal.cache.config, as_layer(layer, deal.cache.num_layers)
    end = shards.end if layer is None else shards.end[layer]
    first, stop = deal.below(end), deal.below(end + count)
    new = raw_segments(config, tuple(deal.own(x, end) for x in sides), stop - first, first)
    attention = Attention.of(deal, asked, end, count)

    def seen(at: jax.Array) -> list[Segment]:
        parts = [*segments(deal.cache, layer), *new]
        return [seen_singly(config, part, deal.below(at + 1)) for part in parts]

    return attention.merged([attention.over(seen)], return_lse)


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
