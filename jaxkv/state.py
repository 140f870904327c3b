"""The state of a cache: an immutable pytree, how it is allocated, and where its tokens are."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv import ring
from jaxkv.chain import TierSpec
from jaxkv.checks import as_int
from jaxkv.config import KvCacheConfig
from jaxkv.devices import copy, settled
from jaxkv.formats import QuantSpec
from jaxkv.status import joined
from jaxkv.summary import summary
from jaxkv.tiers import tokens
from jaxkv.tiers.entry import finite
from jaxkv.tiers.pages import Pages
from jaxkv.tiers.place import Index
from jaxkv.tiers.segment import Segment, Tier
from jaxkv.tiers.summaries import Summaries
from jaxkv.tiers.tokens import Tokens
from jaxkv.trees import node


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
    summaries: Summaries | None = None  # of those pages, and the one that is nobody's

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
