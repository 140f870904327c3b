"""The state of a cache: an immutable pytree, how it is allocated, and everything that only reads
it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv import ring
from jaxkv.checks import as_int, as_layer
from jaxkv.config import KvCacheConfig, TierSpec
from jaxkv.devices import copy, settled
from jaxkv.formats import Format, QuantSpec, plain
from jaxkv.status import joined
from jaxkv.summary import summary
from jaxkv.tiers import tokens
from jaxkv.tiers.entry import finite
from jaxkv.tiers.pages import Pages
from jaxkv.tiers.place import Index
from jaxkv.tiers.tokens import Tokens, only
from jaxkv.trees import node


@node
@dataclasses.dataclass(frozen=True)
class Tier:
    """Keys and values of one tier."""

    keys: Tokens
    values: Tokens | None = None  # None: a part of the keys

    @property
    def sides(self) -> tuple[Tokens, ...]:
        """What is stored, as `TierSpec.formats`."""
        return (self.keys,) if self.values is None else (self.keys, self.values)


@node
@dataclasses.dataclass(frozen=True, repr=False)
class CacheState:
    """The tokens of B rows (and L layers). Made by `init`; every verb returns a new one.

    A token at position p >= sink_tokens lives in slot (p - sink_tokens) % capacity of its tier
    (`ring`), or in a page of a pool (`jaxkv.paged`). A tree of zeros is an empty cache, but for a
    pool's free pages and the means that `init` may be given.
    """

    sinks: Tier | None  # positions [0, sink_tokens)
    tiers: tuple[Tier, ...]  # config.chain, newest first
    end: jax.Array  # [B] or [L, B] int32: the next position
    lost: jax.Array  # [B, n] or [L, B, n] int32: the chain's tokens gone from each tier's ring
    refused: jax.Array  # [B] or [L, B] int32: Status bits of refused requests, sticky
    changed: jax.Array  # [B, K] or [L, B, K] int32: Status bits of what entered changed, sticky
    config: KvCacheConfig = dataclasses.field(metadata={"static": True})
    pages: Pages | None = None  # where the last tier's tokens lie in the pages of a pool

    def __repr__(self) -> str:
        return summary("CacheState", self.config, self.end)

    def __copy__(self) -> CacheState:
        return copy(self)

    @property
    def begin(self) -> jax.Array:
        """First position of the chain still held, [B] or [L, B] int32. Sinks are held besides."""
        return ring.starts(self.config, self.end, self.kept)[-1]

    @property
    def kept(self) -> jax.Array:
        """First position still present in each tier's ring, [B, n] or [L, B, n] int32."""
        return self.lost + self.config.sink_tokens

    @property
    def status(self) -> jax.Array:
        """Status bits, [B] or [L, B] int32. Sticky: `clear` takes them back."""
        with jax.transfer_guard("allow"):
            return self.refused | joined(self.changed, (self.changed.ndim - 1,))

    @property
    def batch_size(self) -> int:
        return self.end.shape[-1]

    @property
    def num_layers(self) -> int | None:
        return self.end.shape[0] if self.end.ndim == 2 else None


def init(
    config: KvCacheConfig,
    batch_size: int = 1,
    num_layers: int | None = None,
    *,
    key_mean: jax.Array | None = None,
    value_mean: jax.Array | None = None,
    device: Any = None,
) -> CacheState:
    """An empty cache; all arrays are allocated here and keep their shapes for ever.

    Args:
      num_layers: every array gets a leading axis L, and `append`, `attend` and `prefill` take
        `layer=`.
      key_mean, value_mean: [K, H] and [K, V] (or [L, K, H] and [L, K, V]), what tiers with
        `center=True` subtract before they quantize.
      device: a device or a sharding to put the arrays on; None: JAX's default. Where there are
        several and others of a step's arguments have been put on one, give it here, or the step's
        second call compiles it anew.
    """
    batch_size = as_int("batch_size", batch_size, 1)
    num_layers = None if num_layers is None else as_int("num_layers", num_layers, 1)
    bases = None if config.rotary is None else config.rotary.layer_bases
    if bases is not None and len(bases) != num_layers:
        raise ValueError(
            f"num_layers={num_layers}: the rotary embedding has {len(bases)} layer_bases, one for "
            "each layer"
        )
    with jax.transfer_guard("allow"):  # of a zero: a new cache is no oversight
        empty = allocated(config, batch_size, num_layers)
        return settled(with_means(empty, key_mean, value_mean), device)


def allocated(
    config: KvCacheConfig, batch_size: int, num_layers: int | None, pages: Pages | None = None
) -> CacheState:
    """The arrays of `init`; with `pages`, the last tier's are those of a pool, and one page more,
    which is nobody's."""
    lead = (batch_size,) if num_layers is None else (num_layers, batch_size)
    heads = config.num_kv_heads

    def tier(spec: TierSpec, capacity: int, stored: tuple[int, ...] | None = None) -> Tier:
        return Tier(
            *(
                tokens.allocate(fmt, lead, heads, capacity, dim, stored)
                for fmt, dim in zip(spec.formats, config.side_dims, strict=True)
            )
        )

    sinks = tier(config.sink_spec, config.sink_tokens) if config.sink_tokens else None
    *chain, last = config.chain
    tiers = [tier(spec, spec.capacity) for spec in chain]
    if pages is None:
        tiers.append(tier(last, last.capacity))
    else:
        tiers.append(tier(last, pages.size, (*lead[:-1], pages.num_pages + 1)))
    zeros = jnp.zeros(lead, jnp.int32)
    lost = jnp.zeros((*lead, len(tiers)), jnp.int32)
    refused, changed = jnp.zeros_like(zeros), jnp.zeros((*lead, heads), jnp.int32)
    return CacheState(sinks, tuple(tiers), zeros, lost, refused, changed, config, pages)


def check_rows_apart(state: CacheState, verb: str) -> None:
    """Refuses a pool, for verbs that take rows apart."""
    if state.pages is not None:
        raise ValueError(
            f"{verb}: the rows of a pool share their pages; use fork, snapshot, adopt or offload "
            "of jaxkv.paged"
        )


def with_means(
    state: CacheState, key_mean: jax.Array | None, value_mean: jax.Array | None
) -> CacheState:
    def given(held: Tokens, name: str, mean: jax.Array | None) -> Tokens:
        if held.mean is None or mean is None:
            return held
        wanted = (*state.end.shape[:-1], *held.mean.shape[-2:])
        if jnp.shape(mean) != wanted:
            raise ValueError(f"{name} has shape {jnp.shape(mean)}: must be {wanted}")
        return dataclasses.replace(
            held,
            mean=jnp.broadcast_to(jnp.expand_dims(finite(mean), -3), held.mean.shape),
        )

    uses = any(
        isinstance(f, QuantSpec) and f.center for spec in state.config.chain for f in spec.formats
    )
    if not uses and not (key_mean is None and value_mean is None):
        raise ValueError(
            "a mean was given, but no tier uses it: set center=True in key_quant or value_quant"
        )
    names, means = ("key_mean", "value_mean"), (key_mean, value_mean)
    tiers = tuple(
        Tier(
            *(
                given(side, name, mean)
                for side, name, mean in zip(t.sides, names, means, strict=False)
            )
        )
        for t in state.tiers
    )
    return dataclasses.replace(state, tiers=tiers)


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


@dataclasses.dataclass(frozen=True)
class Segment:
    """One tier (or the sinks) of one layer with the positions [low, high) that it holds, [B] int32
    each (or [L, B])."""

    tier: Tier
    spec: TierSpec
    low: jax.Array
    high: jax.Array
    base: jax.Array | None = None  # [B]: added to a position here to make it the row's own
    pages: Pages | None = None  # where the tier's slots are those of a pool
    # [B, T] each: what each query finds here, where that is not the same for all of them
    span: tuple[jax.Array, jax.Array] | None = None
    layer: Index = None  # of the tier's arrays

    def seen(self, span: tuple[jax.Array, jax.Array]) -> Segment:
        """The segment of queries that find [low, high) here, [B, T] each; of an empty range, as
        queries without a position have it, nothing."""
        low, high = span
        least = jnp.where(low < high, low, self.high[:, None]).min(1)
        return dataclasses.replace(self, low=jnp.minimum(self.low, least), span=span)

    def row(self, row: Index) -> Segment:
        """The positions [1] of one row; the tier still has all rows."""
        base = None if self.base is None else only(self.base, row)
        span = self.span and (only(self.span[0], row), only(self.span[1], row))
        low, high = only(self.low, row), only(self.high, row)
        pages = self.pages and self.pages.row(row)
        return dataclasses.replace(self, low=low, high=high, base=base, span=span, pages=pages)

    def within(self, reach: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The positions [first, stop) [B] held of those from reach[0] to reach[1], as counted
        here."""
        oldest, newest = reach if self.base is None else (x - self.base for x in reach)
        first = jnp.maximum(self.low, oldest)
        return first, jnp.maximum(jnp.minimum(self.high, newest + 1), first)

    def codes_only(self) -> Segment:
        """The same codes without their basis, for kernels: they multiply codes, and know nothing of
        means and rotations."""
        sides = map(tokens.without_basis, self.tier.sides)
        value = None if self.spec.value is None else plain(self.spec.value)
        spec = dataclasses.replace(self.spec, key=plain(self.spec.key), value=value, rotary=None)
        return dataclasses.replace(self, tier=Tier(*sides), spec=spec)


def segments(
    state: CacheState, layer: Index = None, as_of: jax.Array | None = None
) -> list[Segment]:
    """Where the tokens held are: the sinks, if any, and the tiers of the chain.

    `as_of` [B, T], ends at or below the present one: each of T queries finds in every tier what was
    there when the row ended so, as far as the rings still have it (up to `rewind_length` tokens
    back: all of it).
    """
    config = state.config
    end, kept = (state.end, state.kept) if layer is None else (state.end[layer], state.kept[layer])

    def boundaries(end: jax.Array, kept: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        lows = ring.starts(config, end, kept)
        return list(zip(lows, ring.uppers(config, end, lows), strict=True))

    found = [
        Segment(tier, spec, *bounds, layer=layer)
        for tier, spec, bounds in zip(state.tiers, config.chain, boundaries(end, kept), strict=True)
    ]
    if as_of is not None:
        spans = boundaries(as_of, kept[:, None])
        found = [part.seen(span) for part, span in zip(found, spans, strict=True)]
    found[-1] = dataclasses.replace(found[-1], pages=state.pages)
    if state.sinks is None:
        return found
    return [
        Segment(
            state.sinks,
            config.sink_spec,
            jnp.zeros_like(end),
            jnp.minimum(end, config.sink_tokens),
            layer=layer,
        ),
        *found,
    ]


def stats(state: CacheState) -> KvCacheStats:
    """Counts and bytes of the tokens held now."""
    tokens_of = dict.fromkeys(("sinks", "hot", "warm", "cold"), jnp.zeros_like(state.end))
    bytes_of = dict.fromkeys(tokens_of, jnp.float32(0))
    for part in segments(state):
        tokens_of[part.spec.name] = part.high - part.low
        held = (part.high - part.low).astype(jnp.float32)  # int32 would not hold their sum
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


def _sum(counts: jax.Array) -> jax.Array:
    """In float32: a stack of layers with millions of tokens overflows int32."""
    return counts.astype(jnp.float32).sum()


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


def gather(state: CacheState, *, layer: Index = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All tokens held, dequantized, sinks first, then oldest to newest. For looking and exporting:
    it unpacks the whole cache.

    Returns:
      keys [B, P, K, H], values [B, P, K, V] float32, zeros where empty; P = max_tokens.
      positions: [B, P] int32, -1 where empty.
      With several layers and no `layer`, each has a leading axis L.
    """
    if layer is None and state.num_layers is not None:
        return jax.vmap(lambda layer: gather(state, layer=layer))(
            jnp.arange(state.num_layers, dtype=jnp.int32)
        )
    layer, exists = as_layer(layer, state.num_layers)
    parts = segments(state, layer)
    index = jnp.arange(state.config.max_tokens, dtype=jnp.int32)[None]
    sinks_held = jnp.zeros_like(parts[-1].low) if state.sinks is None else parts[0].high
    position = jnp.where(
        index < sinks_held[:, None], index, (parts[-1].low - sinks_held)[:, None] + index
    )
    end = jnp.maximum(sinks_held, parts[0 if state.sinks is None else 1].high)
    position = jnp.where((position < end[:, None]) & exists, position, -1)
    config, shape = state.config, (*position.shape, state.config.num_kv_heads)
    sides = [jnp.zeros((*shape, dim), jnp.float32) for dim in config.side_dims]
    for part in parts:
        inside = (position >= part.low[:, None]) & (position < part.high[:, None])
        found = [
            _tokens_at(part, held, fmt, position, layer)
            for held, fmt in zip(part.tier.sides, part.spec.formats, strict=True)
        ]
        turned = tokens.turned_mean_of(part.tier.keys, part.spec.rotary, layer)
        found[0] = found[0] if turned is None else found[0] + turned.at(position)
        sides = [
            jnp.where(inside[..., None, None], new, old)
            for old, new in zip(sides, found, strict=True)
        ]
    keys, values = sides[0], sides[-1][..., : config.output_dim]
    return keys, values, position


def _tokens_at(
    part: Segment, held: Tokens, fmt: Format, position: jax.Array, layer: Index
) -> jax.Array:
    """The tokens [B, P, K, H] in the slots of `position` [B, P]; what is no position of the tier
    gives anything."""
    capacity = part.spec.capacity if part.pages is None else part.pages.capacity
    every = jnp.arange(capacity, dtype=jnp.int32)[None]
    every = jnp.broadcast_to(every, (position.shape[0], capacity))
    slots = ring.slot_of(position, part.spec.offset, capacity)
    found = tokens.read(held, fmt, every, layer, part.pages)
    return jnp.take_along_axis(found, slots[..., None, None], axis=1)
