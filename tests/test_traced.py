"""Layers that are alike are traced and lowered once, and calls that differ are not taken for each
other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import CacheState, KvCacheConfig

CONFIG = KvCacheConfig(tail_length=8, max_tokens=64, num_kv_heads=2, head_dim=16)


def lines(layers: int) -> int:
    """Of the lowered decode step of a model that unrolls its layers."""

    def step(states: list[CacheState], query: jax.Array, new: jax.Array) -> Any:
        states = [jaxkv.append(state, new, new) for state in states]
        for state in states:
            query = jaxkv.attend(state, query, window=20)
        return states, query

    states = [jax.eval_shape(lambda: jaxkv.init(CONFIG)) for _ in range(layers)]
    query, new = (jax.ShapeDtypeStruct((1, 1, n, 16), jnp.float32) for n in (4, 2))
    return jax.jit(step).lower(states, query, new).as_text().count("\n")


def test_a_layer_more_is_two_calls() -> None:
    assert (lines(12) - lines(4)) / 8 < 20  # some 2,000 where each layer is lowered by itself


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window", "soft_cap", "decay", "causal", "scale"])
def test_options_are_not_mixed_up(name: str, rng: np.random.Generator) -> None:
    """Options of equal shape, also those that are equal to Python, each in their own trace."""
    values: dict[str, list[Any]] = {
        "window": [3, 5, None],
        "soft_cap": [1, 2.0, None],
        "decay": [1, 0.5, 1.0],
        "causal": [True, False, True],
        "scale": [1, 0.25, None],
    }
    query, new = (jnp.asarray(rng.normal(size=(1, 4, n, 16)), jnp.float32) for n in (4, 2))
    state = jaxkv.append(jaxkv.init(CONFIG), new, new)

    def each(state: CacheState, query: jax.Array) -> list[jax.Array]:
        return [jaxkv.attend(state, query, **{name: value}) for value in values[name]]

    for found, wanted in zip(jax.jit(each)(state, query), each(state, query), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_what_can_be_looked_at_is_refused_inside_a_trace(rng: np.random.Generator) -> None:
    state, new = jaxkv.init(CONFIG), jnp.asarray(rng.normal(size=(1, 2, 2, 16)), jnp.float32)
    with pytest.raises(ValueError, match="lengths"):
        jax.jit(lambda state: jaxkv.append(state, new, new, lengths=np.array([3])))(state)
