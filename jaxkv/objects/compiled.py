"""The compiled functions behind the objects: the pure ones of `jaxkv`, for a batch of one. All
caches of one configuration share them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkv import drop, ring, update
from jaxkv.attend import attend as attend_to
from jaxkv.chain import TierSpec
from jaxkv.config import KvCacheConfig, Overflow
from jaxkv.formats import Format
from jaxkv.gather import gather as gather_tokens
from jaxkv.migration import ALIGN_TOKENS
from jaxkv.state import CacheState, init
from jaxkv.stats import stats as count
from jaxkv.tiers.segment import Tier
from jaxkv.tiers.tokens import Tokens, learn


def donated(verb: Callable[..., Any]) -> Callable[..., list[jax.Array]]:
    """The compiled (structure, leaves, *args) -> leaves of `verb(state, *args)`, which is a state,
    or one and arrays besides; the state's leaves are donated.

    Leaves in lists, so that no line of Python runs between the device's answer and its keeping
    (`Holder.donate`): a state's dataclasses are built by one.
    """

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def run(structure: Any, leaves: list[jax.Array], *args: Any) -> list[jax.Array]:
        return jax.tree.leaves(verb(jax.tree.unflatten(structure, leaves), *args))

    return run


@donated
def append(
    state: CacheState, keys: jax.Array, values: jax.Array | None, lengths: jax.Array | None
) -> CacheState:
    """Tokens are flat or [T, K, H] (values [T, K, V], or None), lengths [1] or None."""
    config, lead = state.config, (1, -1, state.config.num_kv_heads)
    values = None if values is None else values.reshape(*lead, config.output_dim)
    return update.append(state, keys.reshape(*lead, config.head_dim), values, lengths)


@jax.jit
def attend(
    state: CacheState,
    query: jax.Array,
    scale: ArrayLike | None,
    decay: ArrayLike | None,
    lengths: jax.Array | None,
) -> jax.Array:
    """Attention of a query [N * H], [N, H] or [T, N, H]; the output has its shape, with V in place
    of H."""
    shape = (1, query.shape[0] if query.ndim == 3 else 1, -1, state.config.head_dim)
    out: jax.Array = attend_to(state, query.reshape(shape), scale, lengths=lengths, decay=decay)
    return out.reshape(-1 if query.ndim == 1 else (*query.shape[:-1], state.config.output_dim))


@donated
def evict(state: CacheState, count: int) -> tuple[CacheState, jax.Array]:
    """The state with the status bits that this raised taken out of it, and those bits [1]."""
    return _without_status(drop.evict(state, count))


@donated
def rewind(state: CacheState, count: int) -> tuple[CacheState, jax.Array]:
    """As `evict`."""
    return _without_status(drop.rewind(state, count))


def _without_status(state: CacheState) -> tuple[CacheState, jax.Array]:
    return dataclasses.replace(state, refused=jnp.zeros_like(state.refused)), state.refused


clear = donated(drop.clear)
gather = jax.jit(gather_tokens)
stats = jax.jit(count)


@functools.partial(jax.jit, static_argnums=1)
def move(state: CacheState, config: KvCacheConfig) -> CacheState:
    """The tokens of `state`, at their positions, in a cache of another configuration with as many
    sinks; the newest that fit."""
    sinks, wanted = config.sink_tokens, config
    config = dataclasses.replace(config, overflow=Overflow.EVICT)  # the newest that fit
    *sides, positions = gather_tokens(state)
    sides = sides[: len(config.side_dims)]
    moved = init(config)
    if sinks:
        moved = _appended(moved, [x[:, :sinks] for x in sides], jnp.minimum(state.end, sinks))
    # The chain starts where the old one does, so that positions stay; in front of a group of tokens
    # that is cut there, copies of its first token held stand for those evicted, which the group's
    # scale would otherwise have to span as zeros.
    first = ring.round_down(config, state.begin)
    missing = state.begin - first
    lost = jnp.broadcast_to((first - sinks)[:, None], moved.lost.shape)
    moved = dataclasses.replace(moved, end=jnp.minimum(state.end, first), lost=lost)
    held = (positions[:, sinks:] >= 0).sum(axis=-1, dtype=jnp.int32)
    source = sinks + jnp.maximum(
        jnp.arange(state.config.room + config.step - 1) - missing[:, None], 0
    )
    source = jnp.minimum(source, sides[0].shape[1] - 1)[..., None, None]
    sides = [jnp.take_along_axis(x, source, axis=1) for x in sides]
    tiers = tuple(
        _adapted(tier, spec, sides, first)
        for tier, spec in zip(moved.tiers, config.chain, strict=True)
    )
    moved = _appended(dataclasses.replace(moved, tiers=tiers), sides, held + missing)
    return dataclasses.replace(
        moved, lost=moved.lost.at[:, -1].max(state.begin - sinks), config=wanted
    )


def _appended(state: CacheState, sides: list[jax.Array], lengths: jax.Array) -> CacheState:
    return update.append(state, sides[0], sides[1] if len(sides) > 1 else None, lengths)


def _adapted(tier: Tier, spec: TierSpec, given: list[jax.Array], start: jax.Array) -> Tier:
    """An empty tier that has learned its basis, if any, from the oldest of tokens [1, P, K, H], the
    first of them at position `start` [1].

    An append learns it from a row's first positions only, which are gone where the oldest tokens
    have been evicted.
    """

    def half(held: Tokens, fmt: Format, x: jax.Array) -> Tokens:
        first, every = x[:, :ALIGN_TOKENS], jnp.ones(1, bool)
        position = start[:, None] + jnp.arange(first.shape[1], dtype=jnp.int32)[None]
        learnt = learn(held, fmt, spec.rotary, first, position, every, None)
        return dataclasses.replace(held, **learnt)

    sides = zip(tier.sides, spec.formats, given, strict=True)
    return Tier(*(half(*side) for side in sides))
