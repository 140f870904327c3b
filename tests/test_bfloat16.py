"""A tier in bfloat16 gives the same attention whether the CPU has units for its products or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import KvCacheConfig, platform

LENGTH = 40


@pytest.mark.slow
@pytest.mark.parametrize("has_units", [True, False])
def test_with_and_without_units(
    has_units: bool, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Both are off by float32's rounding, not by bfloat16's."""
    monkeypatch.setattr(platform, "multiplies_bfloat16", lambda: has_units)
    config = KvCacheConfig(
        8, max_tokens=64, num_kv_heads=2, head_dim=32, tail_precision="bf16", store_precision="bf16"
    )
    query, keys, values = (
        rng.normal(size=(1, size, heads, 32)).astype(np.float32)
        for size, heads in ((1, 4), (LENGTH, 2), (LENGTH, 2))
    )
    query *= 8  # scores of some 20: with one term of the three 4e-3 are amiss
    state = jaxkv.append(jaxkv.init(config), keys, values)
    keys, values = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (keys, values))
    scores = np.einsum("kgh,skh->kgs", query[0, 0].reshape(2, 2, 32), keys[0]) * 32**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = np.einsum("kgs,skh->kgh", weights / weights.sum(-1, keepdims=True), values[0])
    found = jax.jit(lambda *args: jaxkv.attend(*args))(state, jnp.asarray(query))  # traced anew
    np.testing.assert_allclose(found[0, 0], wanted.reshape(4, 32), rtol=0, atol=1e-5)
