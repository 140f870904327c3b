"""The verbs over `Layers`. Those of one layer take its number; the others act on all layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkv import batch, drop, update
from jaxkv.attend import attend as attend_state
from jaxkv.checks import as_counts, in_range
from jaxkv.drafts import keep as keep_state
from jaxkv.extend import extend as extend_state
from jaxkv.gather import gather as gather_state
from jaxkv.models.layers import Layer, Layers, check_own, keepers
from jaxkv.models.spec import Kind, LayerSpec
from jaxkv.padding import positions as positions_state
from jaxkv.state import CacheState
from jaxkv.stats import KvCacheStats
from jaxkv.stats import stats as stats_state

# One layer.


def append(
    layers: Layers,
    keys: jax.Array,
    values: jax.Array,
    lengths: ArrayLike | None = None,
    *,
    layer: Layer,
    **options: Any,
) -> Layers:
    """`jaxkv.append` to the cache of a layer that keeps one."""
    spec, stack, index = layers.find(layer)
    _check_keeps(layer, spec)
    held = layers.stacks[stack]
    return layers.with_stack(
        stack, update.append(held, keys, values, lengths, layer=index, **options)
    )


def attend(
    layers: Layers,
    query: jax.Array,
    scale: ArrayLike | None = None,
    *,
    lengths: ArrayLike | None = None,
    layer: Layer,
    **options: Any,
) -> Any:
    """`jaxkv.attend` to what a layer looks at, scored as its spec says unless told otherwise."""
    spec, stack, index = layers.find(layer)
    held = layers.stacks[stack]
    given = as_counts("lengths", lengths, layers.batch_size, query.shape[1])
    start = held.end[index] - in_range(given, query.shape[1])
    options = _options(spec, scale, options, start, query)
    return attend_state(held, query, lengths=lengths, layer=index, **options)


def extend(
    layers: Layers,
    query: jax.Array,
    keys: jax.Array | None,
    values: jax.Array | None,
    valid: ArrayLike | None = None,
    *,
    lengths: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    layer: Layer,
    **options: Any,
) -> tuple[Layers, Any]:
    """`jaxkv.extend` of a layer, scored as its spec says; one that keeps nothing takes no keys."""
    spec, stack, index = layers.find(layer)
    held, size = layers.stacks[stack], query.shape[1]
    start = held.end[index]
    if keys is not None or values is not None:
        _check_keeps(layer, spec)
    elif valid is not None:
        start = start - jnp.asarray(valid).sum(1, dtype=jnp.int32)
    else:
        start = start - in_range(as_counts("lengths", lengths, layers.batch_size, size), size)
    options = _options(spec, scale, options, start, query, valid)
    new, out = extend_state(
        held, query, keys, values, valid, lengths=lengths, layer=index, **options
    )
    return layers.with_stack(stack, new), out


def prefill(
    layers: Layers,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: ArrayLike | None = None,
    **options: Any,
) -> tuple[Layers, Any]:
    """`jaxkv.prefill` of a layer that keeps a cache, scored as its spec says."""
    return extend(layers, query, keys, values, lengths=lengths, **options)


def gather(layers: Layers, *, layer: Layer) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`jaxkv.gather` of what a layer looks at."""
    _, stack, index = layers.find(layer)
    return gather_state(layers.stacks[stack], layer=index)


def _check_keeps(layer: Layer, spec: LayerSpec) -> None:
    if not spec.keeps:
        raise ValueError(
            f"layer={layer} looks at the cache of layer {spec.shares} and keeps none: append to "
            "that one, and only attend here"
        )


def _options(
    spec: LayerSpec,
    scale: ArrayLike | None,
    given: dict[str, Any],
    start: jax.Array,
    query: jax.Array,
    valid: ArrayLike | None = None,
) -> dict[str, Any]:
    """What a layer is scored by: its spec, and over it what the caller gives. `start` [B] is the
    position of the first query."""
    found = spec.options()
    if spec.kind is Kind.CHUNKED and spec.window is not None:
        given_ones = jnp.ones(query.shape[:2], bool) if valid is None else jnp.asarray(valid)
        position = start[:, None] + jnp.cumsum(given_ones, axis=1, dtype=jnp.int32) - 1
        found["window"] = position % spec.window + 1
    found |= {name: value for name, value in given.items() if value is not None}
    return found if scale is None else found | {"scale": scale}


# All layers.


def evict(layers: Layers, count: ArrayLike) -> Layers:
    """Drops the `count` (int or [B]) oldest positions of every row: in each layer what it holds of
    them, counted in the layer that holds the most. Sinks stay, and so do states of other kinds.

    Raises:
      ValueError: as `jaxkv.evict`.
    """
    longest = max(layers.stacks, key=lambda held: held.config.max_tokens)
    begin = longest.begin[0]
    done = drop.evict(longest, count)
    upto = done.begin[0]

    def evicted(held: CacheState) -> CacheState:
        if held is longest:
            return done
        end = jnp.maximum(held.end[0], held.begin[0])
        below = jnp.where(upto > begin, jnp.clip(upto, held.begin[0], end) - held.begin[0], 0)
        return drop.evict(held, below)

    return dataclasses.replace(layers, stacks=tuple(evicted(held) for held in layers.stacks))


def rewind(layers: Layers, count: ArrayLike, own: Mapping[int, Any] | None = None) -> Layers:
    """Drops the `count` (int or [B]) newest tokens of every row, in all layers or in none.

    Args:
      own: layer number -> the state of its own kind as it was before those tokens, for every layer
        that has one: they cannot be computed backwards. Keep them (arrays are immutable) until the
        draft is accepted.

    Raises:
      ValueError: as `jaxkv.rewind`, for any layer; own states are missing. Inside jit a row that
        one layer refuses stays as it was in all, but for its status.
    """
    layers = _restored(layers, own, "rewind")
    given = as_counts("count", count, layers.batch_size, None)
    after = [drop.rewind(held, count) for held in layers.stacks]
    pairs = list(zip(layers.stacks, after, strict=True))
    refused = jnp.stack([(new.end == old.end).any(0) for old, new in pairs]).any(0) & (given != 0)

    def settled(old: CacheState, new: CacheState) -> CacheState:
        """The positions as they were in rows that are refused; a rewind moves nothing else."""
        end, lost = (
            _in_rows(refused, 1, getattr(old, name), getattr(new, name)) for name in ("end", "lost")
        )
        return dataclasses.replace(new, end=end, lost=lost)

    return dataclasses.replace(layers, stacks=tuple(settled(old, new) for old, new in pairs))


def keep(layers: Layers, indices: ArrayLike, of: ArrayLike) -> Layers:
    """`jaxkv.keep` in all layers; those with states of their own kind cannot go back so."""
    if any(held is not None for held in layers.own):
        raise ValueError("keep: states of the layers' own kind cannot be taken back; use rewind")
    stacks = tuple(keep_state(held, indices, of) for held in layers.stacks)
    return dataclasses.replace(layers, stacks=stacks)


def positions(layers: Layers, size: int, valid: ArrayLike | None = None) -> jax.Array:
    """`jaxkv.positions` of a model's next tokens."""
    return positions_state(layers.stacks[0], size, valid)


def clear(
    layers: Layers, rows: ArrayLike | None = None, own: Mapping[int, Any] | None = None
) -> Layers:
    """`jaxkv.clear` in all layers; `own` as for `rewind`: the states to begin with."""
    fresh = _restored(layers, own, "clear").own
    chosen = jnp.ones(layers.batch_size, bool)
    if rows is not None:
        chosen = jnp.zeros_like(chosen).at[jnp.asarray(rows)].set(True, mode="drop")
    stacks = tuple(drop.clear(held, rows) for held in layers.stacks)
    own_now = jax.tree.map(lambda old, new: _in_rows(chosen, 0, new, old), layers.own, fresh)
    return dataclasses.replace(layers, stacks=stacks, own=own_now)


def _in_rows(chosen: jax.Array, axis: int, one: jax.Array, other: jax.Array) -> jax.Array:
    """Rows of one array where `chosen` [B], of another elsewhere."""
    shape = [1] * one.ndim
    shape[axis] = -1
    return jnp.where(chosen.reshape(shape), one, other)


def _restored(layers: Layers, own: Mapping[int, Any] | None, verb: str) -> Layers:
    given = own or {}
    missing = {i for i, held in enumerate(layers.own) if held is not None} - set(given)
    if missing:
        raise ValueError(
            f"layers {sorted(missing)} have states of their own kind, which jaxkv cannot {verb}: "
            "pass own={layer: the state as it shall be}"
        )
    for number, value in given.items():
        check_own(number, value, layers.num_layers, layers.batch_size)
        layers = layers.with_own(number, value)
    return layers


def take_rows(layers: Layers, rows: ArrayLike) -> Layers:
    """`jaxkv.take_rows` of all layers, states of their own kind included."""
    stacks = tuple(batch.take_rows(held, rows) for held in layers.stacks)
    own = jax.tree.map(lambda leaf: jnp.take(leaf, jnp.asarray(rows), axis=0), layers.own)
    return dataclasses.replace(layers, stacks=stacks, own=own)


def concatenate(parts: Sequence[Layers]) -> Layers:
    """`jaxkv.concatenate` of all layers."""
    for index, part in enumerate(parts):
        _check_alike(f"states[{index}]", part, "states[0]", parts[0])
    stacks = zip(*(part.stacks for part in parts), strict=True)
    own = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(part.own for part in parts))
    return dataclasses.replace(
        parts[0], stacks=tuple(batch.concatenate(held) for held in stacks), own=own
    )


def replace_rows(layers: Layers, rows: ArrayLike, new: Layers) -> Layers:
    """`jaxkv.replace_rows` of all layers."""
    _check_alike("new", new, "state", layers)
    pairs = zip(layers.stacks, new.stacks, strict=True)
    stacks = tuple(batch.replace_rows(old, rows, row) for old, row in pairs)
    given = jnp.atleast_1d(jnp.asarray(rows))
    target = jnp.where(given < 0, layers.batch_size, given)
    own = jax.tree.map(lambda old, row: old.at[target].set(row, mode="drop"), layers.own, new.own)
    return dataclasses.replace(layers, stacks=stacks, own=own)


def _check_alike(name: str, layers: Layers, other_name: str, other: Layers) -> None:
    same = layers.specs == other.specs
    if not same or _tree(layers.own) != _tree(other.own):
        raise ValueError(f"{name} and {other_name} are of different layers: make both alike")


def _tree(own: Any) -> Any:
    return jax.tree.structure(own)


def stats(layers: Layers) -> KvCacheStats:
    """Counts [layers that keep tokens, B], by number; bytes and ratio over all of them."""
    each = [stats_state(held) for held in layers.stacks]
    places = keepers(layers.specs)

    def by_layer(name: str) -> jax.Array:
        return jnp.stack([getattr(each[stack], name)[rank] for stack, rank in places])

    names = [field.name for field in dataclasses.fields(KvCacheStats)]
    counts = {name: by_layer(name) for name in names if name.endswith("_tokens")}
    tail, store = (sum(getattr(one, n) for one in each) for n in ("tail_bytes", "store_bytes"))
    plain = sum(one.compression_ratio * (one.tail_bytes + one.store_bytes) for one in each)
    held = tail + store
    ratio = jnp.where(held > 0, plain / jnp.maximum(held, 1.0), 1.0)
    return KvCacheStats(**counts, tail_bytes=tail, store_bytes=store, compression_ratio=ratio)
