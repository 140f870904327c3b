"""How much memory a model's cache takes before it is made: per layer, per tier and per device, and
what fits, next to fp16."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh

from jaxkv.chain import TierSpec
from jaxkv.config import KvCacheConfig
from jaxkv.models.spec import LayerSpec
from jaxkv.sharding import Axes, check_divides, share, size
from jaxkv.state import CacheState, init
from jaxkv.stats import bytes_per_token
from jaxkv.summary import describe

Layer = LayerSpec | KvCacheConfig

AXES = Axes(batch="batch", heads="heads", context="context")
"""The mesh axes that a plan knows, by the names of what they split."""


@dataclasses.dataclass(frozen=True)
class TierPlan:
    """One tier of some layers; bytes over all devices."""

    name: str
    keys: str
    values: str
    tokens: int  # that a row holds here at most
    slots: int  # of its ring
    bytes_per_token: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class StackPlan:
    """The layers of one config; bytes over all devices."""

    config: KvCacheConfig
    num_layers: int
    tiers: list[TierPlan]
    bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The size of a cache. Bytes count everything that the device allocates for tokens."""

    stacks: list[StackPlan]
    num_layers: int  # of the model, with those that keep nothing
    max_tokens: int
    batch_size: int
    devices: dict[str, int]
    bytes_per_device: int
    total_bytes: int
    fp16_bytes: int  # of a plain cache of the same tokens in fp16, over all devices
    fits: Fits | None
    notes: tuple[str, ...]  # what is not counted, and what was assumed

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Fits:
    """What fits a memory per device."""

    memory: int
    tokens: int  # of each sequence, with the planned batch; 0: not even the tail
    sequences: int  # of the planned length
    fp16_tokens: int
    fp16_sequences: int


def plan(
    layers: Sequence[Layer],
    batch_size: int = 1,
    devices: Mapping[str, int] | None = None,
    memory: int | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The size of a cache of `batch_size` rows.

    Args:
      layers: of the model, as `layers_of` gives them, or a config for each.
      devices: how many devices split the "batch", the "heads" and the "context"; 1 where not given.
      memory: bytes of one device that the cache may take.
      notes: passed on.

    Raises:
      ValueError: no layer keeps tokens; sizes that do not divide among the devices.
    """
    configs = _counted(layers)
    if not configs:
        raise ValueError("no layer keeps tokens: there is nothing to plan")
    mesh, length = _mesh(devices or {}), max(config.max_tokens for config in configs)
    copies = math.prod(size(mesh, axis) for axis in (AXES.batch, AXES.heads, AXES.context))
    stacks = [_stack(config, count, batch_size, mesh) for config, count in configs.items()]
    per_device = _device_bytes(configs, batch_size, mesh)
    return Plan(
        stacks,
        len(layers),
        length,
        batch_size,
        dict(mesh.shape),
        per_device,
        per_device * copies,
        batch_size * _fp16_bytes(layers, length),
        None if memory is None else _fits(layers, batch_size, mesh, memory),
        tuple(notes),
    )


def state_bytes(config: KvCacheConfig, num_layers: int | None, batch_size: int) -> int:
    """`nbytes` of what `init` would make."""
    return _nbytes(_shapes(config, num_layers, batch_size))


def _config(layer: Layer) -> Any:
    """What a layer keeps; None: no tokens of its own."""
    return layer.config if isinstance(layer, LayerSpec) else layer


def _counted(layers: Sequence[Layer]) -> Counter[KvCacheConfig]:
    return Counter(_config(layer) for layer in layers if _config(layer) is not None)


def _shapes(config: KvCacheConfig, num_layers: int | None, batch_size: int) -> CacheState:
    return jax.eval_shape(lambda: init(config, batch_size, num_layers))


def _mesh(devices: Mapping[str, int]) -> AbstractMesh:
    names = [axis for axis in dataclasses.astuple(AXES) if axis is not None]
    if set(devices) - set(names) or any(number < 1 for number in devices.values()):
        raise ValueError(f"devices={dict(devices)}: must give positive numbers for some of {names}")
    return AbstractMesh(tuple(devices.get(name, 1) for name in names), tuple(names))


def _device_bytes(configs: Mapping[KvCacheConfig, int], batch_size: int, mesh: AbstractMesh) -> int:
    check_divides("batch_size", batch_size, mesh, AXES.batch)
    rows = batch_size // size(mesh, AXES.batch)
    positions = 4 * rows if size(mesh, AXES.context) > 1 else 0  # a layer's `Shards.end`
    return sum(
        state_bytes(share(config, mesh, AXES), count, rows) + count * positions
        for config, count in configs.items()
    )


def _stack(config: KvCacheConfig, count: int, batch_size: int, mesh: AbstractMesh) -> StackPlan:
    """The layers of one config."""
    part, parts = share(config, mesh, AXES), size(mesh, AXES.context)
    copies = math.prod(mesh.shape.values())
    shapes = _shapes(part, count, batch_size // size(mesh, AXES.batch))
    held = [(part.sink_spec, shapes.sinks)] if part.sink_tokens else []
    held += list(zip(part.chain, shapes.tiers, strict=True))
    heads = count * size(mesh, AXES.heads)
    tiers = [_tier(part, spec, heads, parts, _nbytes(tier) * copies) for spec, tier in held]
    total = _device_bytes({config: count}, batch_size, mesh) * copies
    return StackPlan(config, count, tiers, total)


def _tier(part: KvCacheConfig, spec: TierSpec, heads: int, parts: int, total: int) -> TierPlan:
    """A tier of which every device has `spec`; a token has `heads` such parts."""
    return TierPlan(
        spec.name,
        describe(spec.key),
        describe(spec.key if spec.value is None else spec.value),
        spec.length * parts,
        spec.capacity * parts,
        bytes_per_token(part, spec) * heads,
        total,
    )


def _nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * int(leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))


def _fp16_bytes(layers: Sequence[Layer], tokens: int) -> int:
    """Of a row of all layers, with `tokens` in fp16, or what a window shows of them."""
    return sum(
        fp16_per_token(_config(layer)) * _length(layer, tokens)
        for layer in layers
        if _config(layer) is not None
    )


def fp16_per_token(config: KvCacheConfig) -> int:
    """Bytes of one token of one layer in fp16."""
    return 2 * config.num_kv_heads * sum(config.side_dims)


def _fits(layers: Sequence[Layer], batch_size: int, mesh: AbstractMesh, memory: int) -> Fits:
    parts, rows = size(mesh, AXES.context), size(mesh, AXES.batch)
    everywhere = memory * math.prod(mesh.shape.values())
    configs = _counted(layers)
    length = max(config.max_tokens for config in configs)
    least = max(c.sink_tokens + c.tail_length + c.warm_length for c in configs)
    least += 0 if all(c.tail_length + c.warm_length for c in configs) else parts

    def is_enough(units: int) -> bool:
        resized = [_resized(layer, least + units * parts) for layer in layers]
        return _device_bytes(_counted(resized), batch_size, mesh) <= memory

    return Fits(
        memory,
        least + _last(is_enough) * parts if is_enough(0) else 0,
        memory // _device_bytes(configs, rows, mesh) * rows,
        _last(lambda tokens: _fp16_bytes(layers, tokens) * batch_size <= everywhere),
        everywhere // _fp16_bytes(layers, length),
    )


def _length(layer: Layer, tokens: int) -> int:
    """The tokens that a layer keeps of so many."""
    window = layer.window if isinstance(layer, LayerSpec) else None
    return tokens if window is None else min(tokens, window)


def _resized(layer: Layer, tokens: int) -> Layer:
    """The layer of a model with so many tokens."""
    config = _config(layer)
    if config is None:
        return layer
    return dataclasses.replace(config, max_tokens=_length(layer, tokens))


def _last(holds: Callable[[int], bool]) -> int:
    """The last number for which `holds`, which is true at 0 and false from some number on; or a
    number that no position reaches."""
    high = 1
    while high < 2**31 and holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
