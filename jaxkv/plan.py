"""How much memory a cache takes before it is made: per token, per tier and per device, and what
fits, next to fp16."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh

from jaxkv.config import KvCacheConfig, TierSpec
from jaxkv.formats import Format, Precision
from jaxkv.sharding import Axes, check_divides, share, size
from jaxkv.state import bytes_per_token, init
from jaxkv.tiers.tokens import shapes

AXES = Axes(batch="batch", heads="heads", context="context")
"""The mesh axes that a plan knows, by the names of what they split."""


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What of a model decides the size of its cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_context: int | None = None

    @classmethod
    def from_hugging_face(cls, path: str | os.PathLike[str]) -> ModelShape:
        """Reads a config.json, or the one in a folder.

        Raises:
          ValueError: the model caches something else than keys and values of every head, or the
            file does not say how many.
        """
        path = os.path.join(path, "config.json") if os.path.isdir(path) else path
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
        fields = {**fields, **fields.get("text_config", {})}
        if fields.get("kv_lora_rank"):
            raise ValueError(
                f"{os.fspath(path)}: the model caches latent vectors (kv_lora_rank), not keys and "
                "values"
            )
        try:
            heads = fields["num_attention_heads"]
            head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
            layers, kv_heads = (
                fields["num_hidden_layers"],
                fields.get("num_key_value_heads") or heads,
            )
        except KeyError as error:
            raise ValueError(
                f"{os.fspath(path)} has no {error}: give --layers, --kv-heads and --head-dim "
                "instead"
            ) from None
        return cls(layers, kv_heads, head_dim, fields.get("max_position_embeddings"))


@dataclasses.dataclass(frozen=True)
class TierPlan:
    """One tier of all layers; bytes of the whole cache, over all devices."""

    name: str
    keys: str
    values: str
    tokens: int  # that a row holds here at most
    slots: int  # of its ring
    bytes_per_token: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The size of a cache. Bytes count everything that the device allocates."""

    config: KvCacheConfig
    num_layers: int
    batch_size: int
    devices: dict[str, int]
    tiers: list[TierPlan]
    bytes_per_device: int
    total_bytes: int
    fp16_bytes: int  # of a plain cache of as many tokens in fp16, over all devices
    fits: Fits | None

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
    config: KvCacheConfig,
    num_layers: int,
    batch_size: int = 1,
    devices: Mapping[str, int] | None = None,
    memory: int | None = None,
) -> Plan:
    """The size of a cache of `batch_size` rows.

    Args:
      devices: how many devices split the "batch", the "heads" and the "context"; 1 where not given.
      memory: bytes of one device that the cache may take.

    Raises:
      ValueError: sizes that do not divide among the devices.
    """
    mesh = _mesh(devices or {})
    per_device = _device_bytes(config, num_layers, batch_size, mesh)
    copies = math.prod(size(mesh, axis) for axis in (AXES.batch, AXES.heads, AXES.context))
    part = share(config, mesh, AXES)
    specs = ([part.sink_spec] if part.sink_tokens else []) + list(part.chain)
    rows = num_layers * batch_size // size(mesh, AXES.batch)
    tiers = [
        _tier(
            part, spec, rows * copies, num_layers * size(mesh, AXES.heads), size(mesh, AXES.context)
        )
        for spec in specs
    ]
    fp16 = _fp16_bytes(config, num_layers, batch_size * config.max_tokens)
    fits = None if memory is None else _fits(config, num_layers, batch_size, mesh, memory)
    return Plan(
        config,
        num_layers,
        batch_size,
        dict(mesh.shape),
        tiers,
        per_device,
        per_device * copies,
        fp16,
        fits,
    )


def state_bytes(config: KvCacheConfig, num_layers: int | None, batch_size: int) -> int:
    """`nbytes` of what `init` would make."""
    return _nbytes(jax.eval_shape(lambda: init(config, batch_size, num_layers)))


def _mesh(devices: Mapping[str, int]) -> AbstractMesh:
    names = [axis for axis in dataclasses.astuple(AXES) if axis is not None]
    if set(devices) - set(names) or any(number < 1 for number in devices.values()):
        raise ValueError(f"devices={dict(devices)}: must give positive numbers for some of {names}")
    return AbstractMesh(tuple(devices.get(name, 1) for name in names), tuple(names))


def _device_bytes(
    config: KvCacheConfig, num_layers: int, batch_size: int, mesh: AbstractMesh
) -> int:
    check_divides("batch_size", batch_size, mesh, AXES.batch)
    rows = batch_size // size(mesh, AXES.batch)
    whole_end = 4 * num_layers * rows if size(mesh, AXES.context) > 1 else 0  # `Shards.end`
    return state_bytes(share(config, mesh, AXES), num_layers, rows) + whole_end


def _tier(config: KvCacheConfig, spec: TierSpec, copies: int, heads: int, parts: int) -> TierPlan:
    """A tier of which every device has `spec`, `copies` times in all; a token has `heads` such
    parts."""
    one = sum(
        _nbytes(shapes(fmt, config.num_kv_heads, spec.capacity, config.head_dim))
        for fmt in (spec.key, spec.value)
    )
    token = bytes_per_token(config, spec) * heads
    return TierPlan(
        spec.name,
        describe(spec.key),
        describe(spec.value),
        spec.length * parts,
        spec.capacity * parts,
        token,
        one * copies,
    )


def _nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * int(leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))


def describe(fmt: Format) -> str:
    """A format in words."""
    if isinstance(fmt, Precision):
        return fmt.value
    unit = f"{fmt.group_size} tokens of a channel" if fmt.axis == "channel" else f"{fmt.group_size}"
    flags = [
        name
        for name in ("two_level", "symmetric", "rotate", "align", "center")
        if getattr(fmt, name)
    ]
    return ", ".join(
        [f"{fmt.bits} bits, groups of {unit}", *(flag.replace("_", " ") for flag in flags)]
    )


def _fp16_bytes(config: KvCacheConfig, num_layers: int, tokens: int) -> int:
    return 2 * 2 * config.num_kv_heads * config.head_dim * num_layers * tokens


def _fits(
    config: KvCacheConfig, num_layers: int, batch_size: int, mesh: AbstractMesh, memory: int
) -> Fits:
    parts, rows = size(mesh, AXES.context), size(mesh, AXES.batch)
    least = config.sink_tokens + config.tail_length + config.warm_length
    least += 0 if config.tail_length + config.warm_length else parts

    def is_enough(units: int) -> bool:
        longer = dataclasses.replace(config, max_tokens=least + units * parts)
        return _device_bytes(longer, num_layers, batch_size, mesh) <= memory

    tokens = least + _last(is_enough) * parts if is_enough(0) else 0
    sequences = memory // _device_bytes(config, num_layers, rows, mesh) * rows
    token = _fp16_bytes(config, num_layers, 1)
    everywhere = memory * math.prod(mesh.shape.values())
    return Fits(
        memory,
        tokens,
        sequences,
        everywhere // (token * batch_size),
        everywhere // (token * config.max_tokens),
    )


def _last(holds: Callable[[int], bool]) -> int:
    """The last number for which `holds`, which is true at 0 and false from some number on."""
    high = 1
    while holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
