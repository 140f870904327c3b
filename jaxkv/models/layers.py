"""The caches of all layers of a model: equal ones stacked, each found by its layer's number."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.config import KvCacheConfig
from jaxkv.models.spec import LayerSpec
from jaxkv.state import CacheState, init
from jaxkv.trees import node

Layer = Any
"""A layer's number. An int, or where it is traced, a pair (like, number): `like` is the number, an
int, of a layer whose cache is of the same kind, so that both are in one stack. Where all layers are
of one kind, the traced number alone."""


class Place(NamedTuple):
    """Where a layer's tokens are: which stack, and which of its layers."""

    stack: int
    rank: int


@node
@dataclasses.dataclass(frozen=True)
class Layers:
    """The state of a model's cache; made by `init_layers`, and taken by every verb like a stack.

    Layers that share a cache find the same one. States of their own kind (linear attention) are
    carried along as they are.
    """

    stacks: tuple[CacheState, ...]  # one for each kind of cache, num_layers of that kind
    own: tuple[Any, ...]  # for each layer: any pytree of arrays [B, ...], or None
    specs: tuple[LayerSpec, ...] = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        shared = sum(spec.shares is not None for spec in self.specs)
        whole = f"Layers: {self.num_layers}, {shared} of them share another's cache"
        return "\n".join([whole, *map(repr, self.stacks)])

    @property
    def num_layers(self) -> int:
        """Of the model, with those that keep nothing."""
        return len(self.specs)

    @property
    def batch_size(self) -> int:
        return self.stacks[0].batch_size

    @property
    def end(self) -> jax.Array:
        """Each row's next position, [B] int32, before the model's layers append."""
        return self.stacks[0].end[0]

    @property
    def status(self) -> jax.Array:
        """Each row's `Status` bits of all layers together, [B] int32."""
        bits = [state.status for state in self.stacks]
        return functools.reduce(jnp.bitwise_or, jnp.concatenate(bits))

    def with_own(self, layer: int, value: Any) -> Layers:
        """The same with another state of its own kind in a layer: arrays [B, ...] in any tree."""
        own = [value if i == layer else held for i, held in enumerate(self.own)]
        return dataclasses.replace(self, own=tuple(own))

    def with_stack(self, stack: int, state: CacheState) -> Layers:
        """The same with another state in place of one stack."""
        stacks = [state if i == stack else held for i, held in enumerate(self.stacks)]
        return dataclasses.replace(self, stacks=tuple(stacks))

    def find(self, layer: Layer) -> tuple[LayerSpec, int, Any]:
        """The spec of a layer (of `like`, where that is given), its stack, and its index there."""
        if isinstance(layer, tuple):
            like, number = layer
        elif isinstance(layer, int | np.integer) or len(self.stacks) > 1:
            like, number = layer, layer
        else:
            like, number = next(i for i, place in enumerate(_places(self.specs)) if place), layer
        if not isinstance(like, int | np.integer):
            raise ValueError(
                f"layer={layer}: must be 0 .. {self.num_layers - 1}; where it is traced, a pair "
                "(the number of a layer of the same kind, an int; the traced number)"
            )
        place = self._place(int(like))
        if isinstance(number, int | np.integer):
            index: Any = self._place(int(number)).rank
        else:
            index = jnp.asarray(_ranks(self.specs, place.stack))[number]
        return self.specs[like], place.stack, index

    def _place(self, layer: int) -> Place:
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer={layer}: the model has layers 0 .. {self.num_layers - 1}")
        place = _places(self.specs)[layer]
        if place is None:
            raise ValueError(f"layer={layer} is of kind {self.specs[layer].kind}: it has no cache")
        return place


def init_layers(
    layers: Sequence[LayerSpec | KvCacheConfig],
    batch_size: int = 1,
    own: Mapping[int, Any] | None = None,
) -> Layers:
    """The empty caches of a model's layers.

    Args:
      layers: as `layers_of` gives them, or a config for each layer.
      own: layer number -> a state of the model's own kind, arrays [B, ...] in any tree, for layers
        that carry one besides or instead.

    Raises:
      ValueError: specs without a size, or none that keeps tokens; own states for other batches.
    """
    specs = tuple(layer if isinstance(layer, LayerSpec) else spec_of(layer) for layer in layers)
    for number, spec in enumerate(specs):
        if spec.keeps and spec.config is None:
            raise ValueError(f"layer {number} has no config: make the specs with `layers_of`")
    stacks = tuple(init(config, batch_size, num_layers=count) for config, count in stacked(specs))
    if not stacks:
        raise ValueError("no layer keeps tokens: there is nothing to hold")
    given = dict(own or {})
    for number, state in given.items():
        check_own(number, state, len(specs), batch_size)
    return Layers(stacks, tuple(given.get(i) for i in range(len(specs))), specs)


def spec_of(config: KvCacheConfig) -> LayerSpec:
    """A layer of which only the config is known."""
    heads, head_dim = config.num_kv_heads, config.head_dim
    return LayerSpec(num_kv_heads=heads, head_dim=head_dim, config=config)


def check_own(number: int, state: Any, num_layers: int, batch_size: int) -> None:
    """A layer's own state must have the batch as its arrays' first axis."""
    if not 0 <= number < num_layers:
        raise ValueError(f"own[{number}]: the model has layers 0 .. {num_layers - 1}")
    for leaf in jax.tree.leaves(state):
        if jnp.shape(leaf)[:1] != (batch_size,):
            raise ValueError(
                f"own[{number}] has an array {jnp.shape(leaf)}: must be [B, ...] = "
                f"[{batch_size}, ...]"
            )


def _kind(spec: LayerSpec) -> LayerSpec:
    """What layers of one stack have in common."""
    return dataclasses.replace(spec, rotary=None)


@functools.lru_cache
def _places(specs: tuple[LayerSpec, ...]) -> tuple[Place | None, ...]:
    kinds: list[LayerSpec] = []
    counts: list[int] = []
    found: list[Place | None] = []
    for spec in specs:
        if spec.shares is not None:
            found.append(found[spec.shares])
            continue
        if not spec.keeps:
            found.append(None)
            continue
        if _kind(spec) not in kinds:
            kinds.append(_kind(spec))
            counts.append(0)
        stack = kinds.index(_kind(spec))
        found.append(Place(stack, counts[stack]))
        counts[stack] += 1
    return tuple(found)


def stacked(specs: tuple[LayerSpec, ...]) -> list[tuple[KvCacheConfig, int]]:
    """The config of each stack, and how many layers it has."""
    kept = [(specs[i].config, place) for i, place in enumerate(_places(specs)) if specs[i].keeps]
    sizes: dict[int, tuple[KvCacheConfig, int]] = {}
    for config, place in kept:
        assert config is not None and place is not None
        sizes[place.stack] = (config, place.rank + 1)
    return [sizes[stack] for stack in range(len(sizes))]


def keepers(specs: tuple[LayerSpec, ...]) -> list[Place]:
    """The places of the layers that keep tokens, by number."""
    places = _places(specs)
    return [place for i, place in enumerate(places) if place is not None and specs[i].keeps]


def _ranks(specs: tuple[LayerSpec, ...], stack: int) -> np.ndarray:
    """Layer number -> index in a stack, -1 for layers of other stacks."""
    found = [p.rank if p is not None and p.stack == stack else -1 for p in _places(specs)]
    return np.asarray(found, np.int32)
