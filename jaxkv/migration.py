"""How tokens pass from tier to tier: what arrives is written, what is due leaves, and the first to
come set a tier's basis."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv import ring
from jaxkv.chain import TierSpec
from jaxkv.config import KvCacheConfig
from jaxkv.formats import Format
from jaxkv.kernels import dispatch
from jaxkv.kernels.dispatch import Implementation
from jaxkv.tiers import tokens
from jaxkv.tiers.pages import Pages
from jaxkv.tiers.place import Index, Run
from jaxkv.tiers.segment import Tier
from jaxkv.tiers.tokens import Tokens

ALIGN_TOKENS = 128
"""Tokens whose mean sets an aligning tier's basis (16 give most of it; KL 0.0020 against
0.0023)."""

ODD_TOKENS = 4
"""The first tokens of a row, left out of that mean: heads dump their weight on them, and their keys
look like no other."""


@dataclasses.dataclass(frozen=True)
class Passage:
    """Where the boundaries of `ring.starts` go in one append, and what the rings had kept before
    it."""

    kept: jax.Array  # [B, n]
    low: list[jax.Array]  # before, [B] each
    new_low: list[jax.Array]  # after

    def into(self, config: KvCacheConfig, index: int) -> tuple[jax.Array, jax.Array]:
        """The positions [first, stop) [B] to be written to tier `index` >= 1.

        From an evicted start they begin a batch earlier where those tokens are still there: groups
        need them, and a rewind may.
        """
        old, stop = self.low[index - 1], self.new_low[index - 1]
        batch = ring.round_down(config, old)
        if config.chain[index].group > 1:
            return batch, ring.round_down(config, stop)
        return jnp.where(
            old == self.low[-1], jnp.maximum(batch, self.kept[:, index - 1]), old
        ), stop

    def is_first(self, upper: jax.Array, new_upper: jax.Array) -> jax.Array:
        """The rows [B] that write to a last tier, from `upper` on, that holds nothing, and nothing
        that a rewind could bring back."""
        return (upper == self.kept[:, -1]) & (new_upper > upper)


def due(
    config: KvCacheConfig, end: jax.Array, kept: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The positions [low, high) [B] that `count` more tokens cause to be written to the last
    tier."""
    low, high = (
        ring.uppers(config, stop, ring.starts(config, stop, kept))[-1]
        for stop in (end, end + count)
    )
    return jnp.maximum(low, high - config.chain[-1].capacity), high


def take_in(
    config: KvCacheConfig,
    tiers: tuple[Tier, ...],
    new: Arrival,
    passage: Passage,
    layer: Index,
    implementation: Implementation,
    pages: Pages | None = None,
) -> tuple[Tier, ...]:
    """The tiers after `new` has entered the first and all that is due has moved on; the last one's
    slots may be those of `pages`."""
    places = [None] * (len(tiers) - 1) + [pages]
    first = adapted(
        tiers[0],
        config.chain[0],
        passage.is_first(new.first, new.stop),
        lambda: (*first_of(new), new.first[:, None]),
        layer,
    )
    first = store(first, config.chain[0], new, layer, implementation, places[0])

    def pass_on(rest: tuple[Tier, ...]) -> tuple[Tier, ...]:
        source, done = Source(config, 0, tiers[0], first, new, layer), []
        for index, tier in enumerate(rest, start=1):
            spec, upper, new_upper = (
                config.chain[index],
                passage.low[index - 1],
                passage.new_low[index - 1],
            )
            first_tokens = functools.partial(source.first_tokens, upper)
            ready = adapted(tier, spec, passage.is_first(upper, new_upper), first_tokens, layer)
            arrival = source.leaving(passage)
            done.append(store(ready, spec, arrival, layer, implementation, places[index]))
            source = Source(config, index, tier, done[-1], arrival, layer)
        return tuple(done)

    rest = tiers[1:]
    if rest and new.size < config.step:
        # Most steps of a batched cache move nothing. The branch that does nothing comes first: the
        # other way round costs three copies of the cache (jax-ml/jax#39449).
        return first, *lax.switch(
            jnp.any(passage.new_low[0] > passage.low[0]).astype(jnp.int32),
            [lambda same: same, pass_on],
            rest,
        )
    return first, *pass_on(rest)


@dataclasses.dataclass(frozen=True)
class Arrival:
    """Tokens on their way into a tier: positions base .. base + M - 1, of which [first, stop) are
    to be written."""

    sides: tuple[jax.Array, ...]  # keys [B, M, K, H], and values unless a part of them
    base: jax.Array  # [B] int32, as are first and stop
    first: jax.Array
    stop: jax.Array

    @property
    def size(self) -> int:
        return int(self.sides[0].shape[1])


def _positions(base: jax.Array, size: int) -> jax.Array:
    return base[:, None] + jnp.arange(size, dtype=jnp.int32)[None]  # [B, M]


def store(
    tier: Tier,
    spec: TierSpec,
    arrival: Arrival,
    layer: Index,
    implementation: Implementation,
    pages: Pages | None = None,
) -> Tier:
    """Writes an arrival into a tier's ring; of more tokens than it has slots, only the newest."""
    lasting = jnp.maximum(arrival.first, arrival.stop - spec.capacity)
    if arrival.size > spec.capacity:
        arrival = _from(arrival, lasting - arrival.base, spec.capacity)
    base = arrival.base
    capacity = spec.capacity if pages is None else pages.capacity
    run = Run(
        ring.slot_of(base, spec.offset, capacity),
        lasting - base,
        arrival.stop - base,
        arrival.size,
        capacity,
        pages,
    )
    keys, turned = arrival.sides[0], tokens.turned_mean_of(tier.keys, spec.rotary, layer)
    if turned is not None:
        keys = keys.astype(jnp.float32) - turned.at(_positions(base, arrival.size))
    new = keys, *arrival.sides[1:]
    return dispatch.write_sides(tier, spec, new, run, layer, implementation)


def _from(arrival: Arrival, index: jax.Array, size: int) -> Arrival:
    """`size` of an arrival's tokens, from number `index` [B] on where there are as many."""
    index = index.clip(0, arrival.size - size)

    def cut(x: jax.Array) -> jax.Array:
        return jax.vmap(lambda x, at: lax.dynamic_slice_in_dim(x, at, size))(x, index)

    sides = tuple(cut(side) for side in arrival.sides)
    return dataclasses.replace(arrival, sides=sides, base=arrival.base + index)


def first_of(arrival: Arrival) -> tuple[jax.Array, ...]:
    """The keys and values [B, 1, K, H] of the first token to be written; of a row that has none,
    any."""
    index = (arrival.first - arrival.base).clip(0, arrival.size - 1)[:, None, None, None]
    return tuple(jnp.take_along_axis(side, index, 1) for side in arrival.sides)


@dataclasses.dataclass(frozen=True)
class Source:
    """A tier that has just taken in an arrival, as the source of what leaves it."""

    config: KvCacheConfig
    index: int
    old: Tier  # before the arrival
    written: Tier  # after it
    arrival: Arrival
    layer: Index

    @property
    def spec(self) -> TierSpec:
        return self.config.chain[self.index]

    def leaving(self, passage: Passage) -> Arrival:
        """What is written to the next tier, as this one represents it.

        A group gets the oldest token there is in place of evicted ones that are gone, so that they
        do not widen its range.
        """
        base = ring.round_down(self.config, passage.low[self.index])
        size = -(-self.arrival.size // self.config.step) * self.config.step
        position = jnp.maximum(_positions(base, size), passage.kept[:, self.index, None])
        return Arrival(self.tokens_at(position), base, *passage.into(self.config, self.index + 1))

    def first_tokens(self, first: jax.Array) -> tuple[jax.Array, ...]:
        """Some of the tokens from `first` on, and their positions [B, n]: `ALIGN_TOKENS` without
        the `ODD_TOKENS`."""
        size = min(ALIGN_TOKENS, self.spec.length)
        skip = min(max(ODD_TOKENS - self.config.sink_tokens, 0), size - 1)
        position = _positions(first + skip, size - skip)
        return *self.tokens_at(position), position

    def tokens_at(self, position: jax.Array) -> tuple[jax.Array, ...]:
        """Keys and values [B, M, K, H] of positions [B, M] that the tier holds or held before the
        arrival.

        They are read from the written ring, which has slots to spare for it; only an arrival that
        overruns those (a prompt) takes the old ring and the arrival apart.
        """
        spec = self.spec
        slots = ring.slot_of(position, spec.offset, spec.capacity)
        has_room = spec.capacity >= spec.length + self.config.step - 1 + self.arrival.size
        fresh = (position - self.arrival.base[:, None]).clip(0, self.arrival.size - 1)[
            ..., None, None
        ]
        is_fresh = (position >= self.arrival.first[:, None])[..., None, None]

        def half(before: Tokens, after: Tokens, fmt: Format, new: jax.Array) -> jax.Array:
            if has_room:
                return tokens.read(after, fmt, slots, self.layer)
            basis = tokens.basis_of(after, fmt, self.layer)
            represented = tokens.decode(basis, tokens.encode(basis, new))
            return jnp.where(
                is_fresh,
                jnp.take_along_axis(represented, fresh, 1),
                tokens.read(before, fmt, slots, self.layer),
            )

        every = zip(
            self.old.sides, self.written.sides, spec.formats, self.arrival.sides, strict=True
        )
        return tuple(half(*one) for one in every)


def adapted(
    tier: Tier,
    spec: TierSpec,
    entering: jax.Array,
    first: Callable[[], tuple[jax.Array, ...]],
    layer: Index,
) -> Tier:
    """The tier with its basis learnt where a row's first tokens are `entering` [B]; `first` gives
    some of those, [B, n, K, H], and their positions [B, n]."""
    halves = list(zip(tier.sides, spec.formats, strict=True))
    old = [tokens.learnt(half) for half, _ in halves]
    if not any(old):
        return tier

    def look(old: list[dict[str, jax.Array]]) -> list[dict[str, jax.Array]]:
        *sides, position = first()
        return [
            tokens.learn(half, fmt, spec.rotary, x, position, entering, layer)
            for (half, fmt), x in zip(halves, sides, strict=True)
        ]

    new = lax.switch(entering.any().astype(jnp.int32), [lambda same: same, look], old)
    return Tier(
        *(
            dataclasses.replace(half, **learnt)
            for (half, _), learnt in zip(halves, new, strict=True)
        )
    )
