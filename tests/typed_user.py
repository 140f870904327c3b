"""A program of a user who checks types strictly; `test_package.py` runs mypy over it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import assert_type

import jax
import jax.numpy as jnp

import jaxkv
from jaxkv import CacheState, KvCacheConfig, Layers, LayerSpec, Status

config: KvCacheConfig = jaxkv.preset("q4", max_tokens=64, num_kv_heads=2, head_dim=16)


@partial(jax.jit, donate_argnums=0)
def step(
    state: CacheState, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[CacheState, jax.Array]:
    state = jaxkv.append(state, key, value)
    return state, jaxkv.attend(state, query, window=32)


def use(path: Path) -> None:
    state = jaxkv.init(config, batch_size=2)
    assert_type(state, CacheState)
    assert_type(state.end, jax.Array)
    query, key = jnp.zeros((2, 1, 4, 16)), jnp.zeros((2, 1, 2, 16))
    state, out = jaxkv.extend(state, query, key, key)
    out, lse = jaxkv.attend(state, query, return_lse=True)
    state = jaxkv.rewind(jaxkv.take_rows(state, jnp.array([1, 1])), 1)
    keys, values, positions = jaxkv.gather(state)
    assert_type(jaxkv.nbytes(state), int)
    assert_type(jaxkv.draw(state), str)
    print(jaxkv.stats(state).total_tokens, Status(int(state.status[0])), out, lse, keys, values)
    jaxkv.save(path, state)
    loaded: CacheState = jaxkv.load(path)
    print(loaded, positions)


def use_layers(path: str) -> None:
    specs = jaxkv.layers_of(path, "q8", max_tokens=128)
    assert_type(specs, tuple[LayerSpec, ...])
    assert_type(jaxkv.init_layers(specs), Layers)
