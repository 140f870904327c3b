"""A tier in bfloat16 gives the same attention whether the CPU has units for its products or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import KvCacheConfig
from jaxkv.kernels import platform

LENGTH = 40


@pytest.mark.parametrize("has_units", [True, False])
def test_with_and_without_units(
    has_units: bool, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Both are float32's accuracy: a product has 32 terms, and three of bfloat16 keep 24 bits."""
    monkeypatch.setattr(platform, "multiplies_bfloat16", lambda: has_units)
    config = KvCacheConfig(
        8, max_tokens=64, num_kv_heads=2, head_dim=32, tail_precision="bf16", store_precision="bf16"
    )
    query, keys, values = (
        rng.normal(size=(1, size, heads, 32)).astype(np.float32)
        for size, heads in ((1, 4), (LENGTH, 2), (LENGTH, 2))
    )
    state = jaxkv.append(jaxkv.init(config), keys, values)
    keys, values = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (keys, values))
    scores = np.einsum("kgh,skh->kgs", query[0, 0].reshape(2, 2, 32), keys[0]) * 32**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = np.einsum("kgs,skh->kgh", weights / weights.sum(-1, keepdims=True), values[0])
    found = jax.jit(jaxkv.attend)(state, jnp.asarray(query))
    np.testing.assert_allclose(found[0, 0], wanted.reshape(4, 32), rtol=0, atol=2e-6)
