"""Writing and reading on linear and on tiled memories: the same bits in the same slots."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import marked

import jaxkv
from jaxkv import platform
from jaxkv.chain import LANES
from jaxkv.tiers.place import Run, scatter, windows

ROWS, HEADS, WORDS = 3, 2, 4
AXES = {-2: (HEADS, "S", WORDS), -1: (HEADS, WORDS, "S")}


def by_hand(old: np.ndarray, new: np.ndarray, run: Run, axis: int) -> np.ndarray:
    """`old` [B, ...] with the tokens of a run set one after the other."""
    out = old.copy()
    for row in range(ROWS):
        for token in range(int(run.first[row]), int(run.stop[row])):
            slot = (int(run.start[row]) + token) % run.capacity
            np.moveaxis(out[row], axis, 0)[slot] = new[row, token]
    return out


def runs(capacity: int, size: int) -> Run:
    """A run that starts the ring, one that crosses its seam, and one of a single token or none."""
    start, first, stop = [0, capacity - 1 - size // 2, capacity // 2], [0, 0, size // 3], [size] * 3
    stop[2] = size // 3 + (size > 3)
    return Run(*(jnp.asarray(x, jnp.int32) for x in (start, first, stop)), size, capacity)


@pytest.mark.parametrize("put", [scatter, windows])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    "capacity",
    [pytest.param(n, marks=marked(n, (), (50, 300))) for n in (1, 2, 50, LANES, 300, 3 * LANES)],
)
def test_tokens_land_in_their_slots(
    capacity: int, axis: int, put: Any, rng: np.random.Generator
) -> None:
    """Runs of every length, around the seam of rings of less than a window, of whole windows and
    of parts; of a layer, and of a state that has none."""
    shape = [ROWS, *(capacity if n == "S" else n for n in AXES[axis])]
    for size in sorted({1, 2, 5, LANES, 290, capacity} & set(range(capacity + 1))):
        run = runs(capacity, size)
        old = rng.integers(-100, 100, (2, *shape)).astype(np.int8)
        new = rng.integers(-100, 100, (ROWS, size, HEADS, WORDS)).astype(np.int8)
        expected = by_hand(old[1], new, run, axis)
        found = jax.jit(put, static_argnums=(4,))(jnp.asarray(old[1]), new, run, None, axis)
        np.testing.assert_array_equal(found, expected)
        found = jax.jit(put, static_argnums=(4,))(jnp.asarray(old), new, run, jnp.int32(1), axis)
        np.testing.assert_array_equal(found, np.stack([old[0], expected]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q4", "Q4K", "Q4_BIAS", "Q2"])
def test_a_cache_is_the_same_on_both(
    name: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """A prompt that overruns the tail, and chunks that wrap the store: the same states, and
    attention to float rounding."""
    config = jaxkv.preset(name, tail_length=40, max_tokens=400, num_kv_heads=2, head_dim=64)
    new = jnp.asarray(rng.normal(size=(2, 600, 2, 64)), jnp.float32)
    query = jnp.asarray(rng.normal(size=(2, 1, 4, 64)), jnp.float32)

    def filled() -> Any:
        append = jax.jit(lambda *args: jaxkv.append(*args))
        state = jaxkv.init(config, 2)
        for start in range(0, 600, 150):
            part = new[:, start : start + 150]
            state = append(state, part, part, jnp.array([150, 75]))
        return state, jax.jit(lambda *args: jaxkv.attend(*args))(state, query)

    linear = filled()
    monkeypatch.setattr(platform, "is_tiled", lambda: True)
    tiled = filled()
    chex.assert_trees_all_equal(tiled[0], linear[0])
    np.testing.assert_allclose(tiled[1], linear[1], atol=2e-6)
