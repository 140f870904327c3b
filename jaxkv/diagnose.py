"""How well a store fits a model's keys and values, and which layers to keep exact for it.

Nothing is recorded while tokens are written: the newest tokens lie exact in the tail, and putting
them through the store's format shows what it would lose of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import ring
from jaxkv.config import KvCacheConfig
from jaxkv.formats import QuantSpec
from jaxkv.migration import adapted
from jaxkv.presets import exact
from jaxkv.state import CacheState, segments
from jaxkv.tiers import tokens
from jaxkv.tiers.segment import Tier

LOSES = 1 / 3
"""The error of scores above which a layer loses: 0.08 to 0.24 in layers whose attention weights
move by a KL of 0.003 to 0.03, 0.4 where it is 0.05, 0.75 to 0.87 where it is 8."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What the store loses of the tokens in the tail, by row and kv head: [B, K] or [L, B, K]
    float32; NaN in rows without any.

    `key_error` is the root mean square of what it moves the score of a query of unit elements by.
    (A trained model's queries have elements of 1 to 3.) `value_error` is relative to the values.
    """

    key_error: Any
    value_error: Any

    def losing(self) -> np.ndarray:
        """The layers [n] whose keys do not fit the store's format: more bits, or `rotary=`, or
        `exact_layers` for them."""
        return np.flatnonzero(self._by_layer(self.key_error) > LOSES)

    def dearest(self) -> np.ndarray:
        """All layers, those first that pay most when they are kept exact."""
        keys, values = (self._by_layer(x) for x in (self.key_error, self.value_error))
        return np.argsort(-(keys**2 + values**2), kind="stable")

    def _by_layer(self, error: Any) -> np.ndarray:
        """The worst head of each layer; its own rows' mean."""
        worst = np.asarray(error).max(-1)  # [B] or [L, B]
        return np.nan_to_num(np.nanmean(np.atleast_2d(worst), axis=-1))


def diagnose(state: CacheState) -> Diagnosis:
    """What the store loses of the tokens in the tail, without writing anything.

    Best after 128 tokens or more; a store that holds nothing yet learns its basis from the tail for
    this.

    Raises:
      ValueError: no quantized store behind a tail of floats.
    """
    config = state.config
    if len(config.chain) < 2 or not any(
        isinstance(fmt, QuantSpec) for fmt in (config.chain[-1].key, config.chain[-1].value)
    ):
        raise ValueError(
            "this cache has no quantized store behind its tail: there is nothing to diagnose"
        )
    if config.chain[-1].value is None:
        raise ValueError("values that are a part of the keys are not diagnosed")
    if state.num_layers is None:
        return _of_layer(state, None)
    each = [_of_layer(state, layer) for layer in range(state.num_layers)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def _of_layer(state: CacheState, layer: int | None) -> Diagnosis:
    config, tail = state.config, segments(state, layer)[state.sinks is not None]
    store, spec = state.tiers[-1], config.chain[-1]
    group = spec.group
    size = max(tail.spec.length // group, 1) * group
    position = (tail.high - size)[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    held = position >= tail.low[:, None]
    slots = ring.slot_of(position, tail.spec.offset, tail.spec.capacity)
    assert tail.tier.values is not None and tail.spec.value is not None
    keys, values = (
        tokens.read(half, fmt, slots, layer)
        for half, fmt in ((tail.tier.keys, tail.spec.key), (tail.tier.values, tail.spec.value))
    )
    empty = segments(state, layer)[-1]
    store = adapted(store, spec, empty.low >= empty.high, lambda: (keys, values, position), layer)
    found = _through(store, spec, keys, values, position, layer)
    errors = [(mine - x) ** 2 for mine, x in zip(found, (keys, values), strict=True)]
    keys_lost, values_lost, size_of_values = (_mean(x, held) for x in (*errors, values**2))
    return Diagnosis(
        jnp.sqrt(keys_lost / config.head_dim),
        jnp.sqrt(values_lost / jnp.maximum(size_of_values, 1e-30)),
    )


def _through(
    store: Tier, spec: Any, keys: jax.Array, values: jax.Array, position: jax.Array, layer: Any
) -> tuple[jax.Array, jax.Array]:
    """Tokens [B, n, K, H] as the store would hold them."""
    turned = tokens.turned_mean_of(store.keys, spec.rotary, layer)
    taken = jnp.zeros_like(keys) if turned is None else turned.at(position)

    def half(held: tokens.Tokens, fmt: Any, x: jax.Array) -> jax.Array:
        basis = tokens.basis_of(held, fmt, layer)
        return tokens.decode(basis, tokens.encode(basis, x))

    assert store.values is not None
    return half(store.keys, spec.key, keys - taken) + taken, half(store.values, spec.value, values)


def _mean(x: jax.Array, held: jax.Array) -> jax.Array:
    """Of [B, n, K, H] over the tokens held, summed over H: [B, K]."""
    total = jnp.where(held[..., None, None], x, 0.0).sum((1, 3))
    return total / held.sum(-1, keepdims=True)


def exact_layers(config: KvCacheConfig, diagnosis: Diagnosis, budget: int) -> list[KvCacheConfig]:
    """One config per layer: `config`, but the `budget` layers unquantized that pay most for it.

    Raises:
      ValueError: more exact layers than layers, or a diagnosis of no layers.
    """
    order = diagnosis.dearest()
    if not 0 <= budget <= len(order):
        raise ValueError(f"budget={budget}: there are {len(order)} layers; keep as many at most")
    kept = set(order[:budget].tolist())
    return [exact(config) if i in kept else config for i in range(len(order))]
