"""A cache dealt out over the devices of a mesh: what it is, how it is made, and what needs no look
at its tokens' neighbours. `shards` has the rest, and says how positions are dealt.

All but `init` and `concatenate` are for use inside `jax.shard_map`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from jaxkv import drop
from jaxkv.config import KvCacheConfig
from jaxkv.gather import gather as gather_whole
from jaxkv.sharding import Axes, check_divides, shardings, share, size, specs
from jaxkv.state import CacheState
from jaxkv.state import init as init_whole
from jaxkv.stats import KvCacheStats
from jaxkv.stats import stats as stats_whole
from jaxkv.tiers.place import Index
from jaxkv.trees import node


@node
@dataclasses.dataclass(frozen=True)
class Shards:
    """One cache on many devices. Made by `init`; the verbs of this module return a new one."""

    # config: one device's share; leaves: [C, ...], inside shard_map [1, ...], of what `jaxkv.init`
    # allocates
    cache: CacheState
    end: jax.Array  # [B] or [L, B] int32: the next position of the whole
    axes: Axes = dataclasses.field(metadata={"static": True})

    @property
    def specs(self) -> Any:
        """The partition spec of every leaf, a tree like this one: `in_specs` and `out_specs` of
        `shard_map`."""
        one = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.cache
        )
        cache = specs(one, self.axes)
        dealt = jax.tree.map(lambda spec: PartitionSpec(self.axes.context, *spec), cache)
        return dataclasses.replace(self, cache=dealt, end=cache.end)


def init(
    config: KvCacheConfig,
    batch_size: int,
    num_layers: int | None = None,
    *,
    mesh: Mesh,
    axes: Axes,
    **means: jax.Array,
) -> Shards:
    """An empty cache dealt out over a mesh; each device allocates its own share. `means` as for
    `jaxkv.init`.

    Raises:
      ValueError: sizes that do not divide (see `sharding.share`).
    """
    check_divides("batch_size", batch_size, mesh, axes.batch)
    part, parts = share(config, mesh, axes), size(mesh, axes.context)
    heads = size(mesh, axes.heads)

    def allocate(means: dict[str, jax.Array]) -> Shards:
        return empty(part, batch_size, num_layers, axes, heads, parts, **means)

    return jax.jit(allocate, out_shardings=shardings(jax.eval_shape(allocate, means).specs, mesh))(
        means
    )


def empty(
    part: KvCacheConfig,
    batch_size: int,
    num_layers: int | None,
    axes: Axes,
    heads: int,
    parts: int,
    **means: jax.Array,
) -> Shards:
    """The arrays of `init`, where kv heads are split among `heads` devices and positions among
    `parts`; `part` is one device's share."""
    axis = 1 if num_layers is None else 2
    all_heads = dataclasses.replace(part, num_kv_heads=part.num_kv_heads * heads)

    def per_device(leaf: jax.Array) -> jax.Array:
        # What all heads share (the units of two-level scales), all heads of one device share.
        return jnp.repeat(leaf, heads, axis) if leaf.shape[axis] < all_heads.num_kv_heads else leaf

    cache = dataclasses.replace(init_whole(all_heads, batch_size, num_layers, **means), config=part)
    sinks, tiers = jax.tree.map(per_device, (cache.sinks, cache.tiers))
    cache = dataclasses.replace(cache, sinks=sinks, tiers=tiers)
    dealt = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (parts, *leaf.shape)), cache)
    return Shards(dealt, jnp.zeros_like(cache.end), axes)


def clear(shards: Shards, rows: ArrayLike | None = None) -> Shards:
    """`jaxkv.clear`; row numbers count the rows that a device has. Works outside `shard_map` too,
    where they count all."""
    end = jnp.where(drop.chosen(shards.cache, rows), 0, shards.end)
    return dataclasses.replace(shards, cache=drop.clear(shards.cache, rows), end=end)


def gather(shards: Shards, *, layer: Index = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`jaxkv.gather` of what this device holds: keys and values are split as `PartitionSpec(batch,
    context, heads)`, positions, those of the whole, as `PartitionSpec(batch, context)`; layers, if
    any, come first."""
    deal = Deal.of(shards)
    keys, values, position = gather_whole(deal.cache, layer=layer)
    return keys, values, jnp.where(position < 0, -1, position * deal.parts + deal.part)


def stats(shards: Shards) -> KvCacheStats:
    """`jaxkv.stats` of the whole: counts of this device's rows, bytes of all."""
    deal = Deal.of(shards)
    found = stats_whole(deal.cache)
    counts = {
        name: deal.total(value) for name, value in vars(found).items() if name.endswith("_tokens")
    }
    axes = shards.axes
    rows = tuple(axis for axis in (axes.batch, axes.context) if axis is not None)
    heads = 1 if axes.heads is None else lax.axis_size(axes.heads)  # they all hold as much

    def all_bytes(own: jax.Array) -> jax.Array:
        return heads * (lax.psum(own, rows) if rows else own)

    tail, store = all_bytes(found.tail_bytes), all_bytes(found.store_bytes)
    fp16 = all_bytes(found.compression_ratio * (found.tail_bytes + found.store_bytes))
    ratio = jnp.where(fp16 > 0, fp16 / jnp.maximum(tail + store, 1.0), 1.0)
    return KvCacheStats(**counts, tail_bytes=tail, store_bytes=store, compression_ratio=ratio)


def concatenate(shards: Sequence[Shards]) -> Shards:
    """`jaxkv.concatenate`: all rows, in order.

    Raises:
      ValueError: none, or some that differ in config, layers or axes.
    """
    if not shards:
        raise ValueError("concatenate got no shards: pass at least one")
    first = shards[0]
    for other in shards[1:]:
        if (other.cache.config, other.axes, other.end.ndim) != (
            first.cache.config,
            first.axes,
            first.end.ndim,
        ):
            raise ValueError(
                f"shards differ: {other.cache.config}, {other.axes}, {other.end.ndim - 1} layer "
                f"axes, and {first.cache.config}, {first.axes}, {first.end.ndim - 1}: make all "
                "with the same"
            )
    rows = first.end.ndim - 1
    ends = jnp.concatenate([each.end for each in shards], axis=rows)
    caches = [each.cache for each in shards]
    cache = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=rows + 1), *caches)
    return Shards(cache, ends, first.axes)


@dataclasses.dataclass(frozen=True)
class Deal:
    """What this device has: its cache, and its place among the `parts` devices that positions are
    dealt to."""

    cache: CacheState
    axis: str | None
    parts: int
    part: jax.Array

    @classmethod
    def of(cls, shards: Shards) -> Deal:
        cache, axis = jax.tree.map(lambda leaf: leaf.squeeze(0), shards.cache), shards.axes.context
        return (
            cls(cache, None, 1, jnp.int32(0))
            if axis is None
            else cls(cache, axis, lax.axis_size(axis), lax.axis_index(axis))
        )

    def below(self, position: jax.Array) -> jax.Array:
        """How many of the positions below `position` are this device's."""
        return (position - self.part + self.parts - 1) // self.parts

    def own(self, x: jax.Array, end: jax.Array) -> jax.Array:
        """Those of the tokens [B, T, K, H] at positions end, end + 1, ... that are this device's,
        [B, ceil(T / C), K, H]."""
        if self.parts == 1:
            return x
        index = ((self.part - end) % self.parts)[:, None] + jnp.arange(
            0, x.shape[1], self.parts, dtype=jnp.int32
        )
        return jnp.take_along_axis(x, index.clip(0, x.shape[1] - 1)[..., None, None], axis=1)

    def total(self, counts: jax.Array) -> jax.Array:
        return counts if self.axis is None else lax.psum(counts, self.axis)
