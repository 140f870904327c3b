"""A cache on many devices, under `jit`: partition specs by rows and kv heads, and how much of a
cache one device of a mesh holds.

A `CacheState` placed by `place` works with every verb as it is (on GPUs with
`implementation="xla"`: no kernel can be partitioned), and XLA adds what communication it wants:
none for `attend`, for `append` some of the size of the new tokens. On a mesh of explicit axes wrap
a verb in `jax.sharding.auto_axes`. Without any communication, and with contexts split over devices:
`jaxkv.shards`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxkv.config import KvCacheConfig, Migration
from jaxkv.formats import QuantSpec
from jaxkv.state import CacheState, check_rows_apart

AnyMesh = Mesh | AbstractMesh  # sizes can be asked of a mesh without devices too


@dataclasses.dataclass(frozen=True)
class Axes:
    """Names of the mesh axes that split a cache; None: not split."""

    batch: str | None = None
    heads: str | None = None
    context: str | None = None

    @property
    def tokens(self) -> PartitionSpec:
        """Of keys, values, queries and outputs, [B, T, heads, H]. Every context device sees all
        T."""
        return PartitionSpec(self.batch, None, self.heads)

    @property
    def rows(self) -> PartitionSpec:
        """Of numbers per row, [B]."""
        return PartitionSpec(self.batch)


def specs(state: CacheState, axes: Axes) -> Any:
    """The partition spec of every leaf of a state split by rows and kv heads, as a tree like the
    state."""
    lead = [None] * (state.end.ndim - 1)  # layers

    def of_tokens(leaf: Any) -> PartitionSpec:
        # One group over all heads has one scale, which every device needs.
        return PartitionSpec(
            *lead, axes.batch, axes.heads if leaf.shape[len(lead) + 1] > 1 else None
        )

    rows: Any = PartitionSpec(*lead, axes.batch)
    sinks, tiers = jax.tree.map(of_tokens, (state.sinks, state.tiers))
    heads: Any = PartitionSpec(*lead, axes.batch, axes.heads)
    return dataclasses.replace(
        state, sinks=sinks, tiers=tiers, end=rows, lost=rows, refused=rows, changed=heads
    )


def place(state: CacheState, mesh: Mesh, axes: Axes) -> CacheState:
    """A state with its arrays spread over a mesh by rows and kv heads; its values stay as they are.

    Raises:
      ValueError: sizes that do not divide; `axes.context`, by which no existing state can be split.
    """
    if axes.context is not None:
        raise ValueError(
            f"context={axes.context!r}: a state is split by batch and heads only; deal out "
            "positions with jaxkv.shards.init"
        )
    check_rows_apart(state, "place")
    check_divides("batch_size", state.batch_size, mesh, axes.batch)
    check_divides("num_kv_heads", state.config.num_kv_heads, mesh, axes.heads)
    return jax.device_put(state, shardings(specs(state, axes), mesh))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree of partition specs as one of shardings, for `device_put`, `jit` and checkpoints."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), tree, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def share(config: KvCacheConfig, mesh: AnyMesh, axes: Axes) -> KvCacheConfig:
    """What one device holds of a cache: its part of the heads, and of every tier's tokens.

    Raises:
      ValueError: the heads or a length are not divisible among the devices, or a scale spans heads
        of several devices.
    """
    heads, parts = size(mesh, axes.heads), size(mesh, axes.context)
    check_divides("num_kv_heads", config.num_kv_heads, mesh, axes.heads)
    names = ["tail_length", "warm_length", "sink_tokens", "max_tokens"]
    names += ["migration_batch"] if config.migration is Migration.BATCHED else []
    for name in names:
        check_divides(name, getattr(config, name), mesh, axes.context)
    formats = [
        (fmt, dim)
        for tier in config.chain
        for fmt, dim in zip(tier.formats, config.side_dims, strict=True)
        if isinstance(fmt, QuantSpec)
    ]
    if heads > 1 and any(
        fmt.axis == "token" and (fmt.group_size or 0) > dim for fmt, dim in formats
    ):
        raise ValueError(
            "a quantization group over all heads cannot be split by heads: choose a group_size "
            "that divides head_dim"
        )
    lengths = {name: getattr(config, name) // parts for name in names}
    lengths["rewind_length"] = -(-config.rewind_length // parts)
    # A device that holds every C-th position counts its own: the embedding knows others.
    rotary = config.rotary if parts == 1 else None
    num_kv_heads = config.num_kv_heads // heads
    return dataclasses.replace(config, num_kv_heads=num_kv_heads, rotary=rotary, **lengths)


def size(mesh: AnyMesh, axis: str | None) -> int:
    """Devices along an axis of a mesh; 1 for None."""
    if axis is not None and axis not in mesh.shape:
        raise ValueError(f"axis {axis!r}: the mesh has axes {list(mesh.shape)}; name one of them")
    return 1 if axis is None else int(mesh.shape[axis])


def check_divides(name: str, value: int, mesh: AnyMesh, axis: str | None) -> None:
    if value % size(mesh, axis):
        raise ValueError(
            f"{name}={value}: must be a multiple of the {size(mesh, axis)} devices of mesh axis "
            f"{axis!r}"
        )
