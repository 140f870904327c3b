"""What callers get wrong where nothing can be raised: rows and layers that do not exist, inside
jit; and options of attention of the wrong kind, which are refused, or taken as they are meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import CacheState, KvCacheConfig, Status

B, L, K, N, H = 3, 2, 2, 4, 16
CONFIG = KvCacheConfig(
    tail_length=4, max_tokens=16, num_kv_heads=K, head_dim=H, sink_tokens=2, store_precision="q8"
)
RNG = np.random.default_rng(0)
NEW = RNG.normal(size=(B, 9, K, H)).astype(np.float32)
QUERY = RNG.normal(size=(B, 2, N, H)).astype(np.float32)
append = jax.jit(jaxkv.append)


@pytest.fixture(scope="module")
def state() -> CacheState:
    """Three rows that hold 9, 0 and 5 tokens."""
    return append(jaxkv.init(CONFIG, B), NEW, NEW, np.array([9, 0, 5]))


@pytest.fixture(scope="module")
def stack() -> CacheState:
    """Two layers of the same."""
    state = jaxkv.init(CONFIG, B, num_layers=L)
    for layer in range(L):
        state = append(state, NEW + layer, NEW, np.array([9, 0, 5]), layer=jnp.int32(layer))
    return state


# Rows.


@pytest.mark.slow
@pytest.mark.parametrize("bad", [3, -1, 2**31 - 1, -(2**31)])
def test_a_row_that_does_not_exist_is_taken_empty(state: CacheState, bad: int) -> None:
    """Inside jit it becomes an empty row with a status; the rows beside it are the ones asked
    for, and it can be filled like any other."""
    taken = jax.jit(jaxkv.take_rows)(state, np.array([2, bad, 0], np.int32))
    np.testing.assert_array_equal(taken.status, [0, Status.OUT_OF_RANGE, 0])
    np.testing.assert_array_equal(taken.end, [5, 0, 9])
    assert not np.asarray(jax.jit(jaxkv.attend)(taken, QUERY))[1].any()
    expected = jaxkv.take_rows(state, [2, 1, 0])
    chex.assert_trees_all_equal(
        jaxkv.gather(append(taken, NEW, NEW)), jaxkv.gather(append(expected, NEW, NEW))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows", [1, np.array([0, 2]), np.array([False, True, True]), np.array([], np.int32)], ids=str
)
def test_clear_rows(stack: CacheState, rows: Any) -> None:
    """The rows named are empty in all layers, status too, jitted or not; the others are as they
    were."""
    flagged = jax.jit(jaxkv.evict)(stack, 99)
    keep = np.ones(B, bool)
    keep[rows] = False
    for clear in (jaxkv.clear, jax.jit(jaxkv.clear)):
        after = clear(flagged, rows)
        np.testing.assert_array_equal(after.end, np.where(keep, [9, 0, 5], 0) + np.zeros((L, 1)))
        np.testing.assert_array_equal(
            after.status, np.where(keep, Status.EVICT_TOO_MANY, 0) + np.zeros((L, 1))
        )
        chex.assert_trees_all_equal(
            jaxkv.gather(jaxkv.take_rows(after, np.flatnonzero(keep)))
            if keep.any()
            else after.config,
            jaxkv.gather(jaxkv.take_rows(stack, np.flatnonzero(keep)))
            if keep.any()
            else stack.config,
        )


def test_clear_refuses_rows(state: CacheState) -> None:
    """Rows that do not exist and arrays that are no rows."""
    for rows in (3, -1, [0, 3]):
        with pytest.raises(ValueError, match=r"the state has rows 0 \.\. 2"):
            jaxkv.clear(state, rows)
    for rows in (1.0, [[0]], [True, False], True, "all"):
        with pytest.raises(ValueError, match=r"must be an int, a vector of row numbers, or a mask"):
            jaxkv.clear(state, rows)
    after = jax.jit(jaxkv.clear)(state, np.array([7, -1]))  # left out
    np.testing.assert_array_equal(after.end, state.end)


# Layers.


@pytest.mark.slow
@pytest.mark.parametrize("bad", [2, -1, 2**31 - 1, -(2**31)])
def test_a_layer_that_does_not_exist(stack: CacheState, bad: int) -> None:
    """Traced, it takes no tokens and shows none, and the nearest layer's status says so; concrete,
    it is refused."""
    bad_layer = jnp.int32(bad)
    one = NEW[:, :2]

    @jax.jit
    def every(layer: Any) -> Any:
        prefilled, prompt = jaxkv.prefill(stack, QUERY, one, one, layer=layer)
        out, lse = jaxkv.attend(stack, QUERY, layer=layer, return_lse=True)
        appended = jaxkv.append(stack, one, one, layer=layer)
        return appended, prefilled, prompt, out, lse, jaxkv.gather(stack, layer=layer)

    appended, prefilled, prompt, out, lse, (keys, values, positions) = every(bad_layer)
    status = np.zeros((L, B), np.int32)
    status[np.clip(bad, 0, L - 1)] = Status.OUT_OF_RANGE
    for after in (appended, prefilled):
        np.testing.assert_array_equal(after.status, status)
        np.testing.assert_array_equal(after.end, stack.end)
        chex.assert_trees_all_equal(jaxkv.gather(after), jaxkv.gather(stack))
    for nothing in (prompt, out, keys, values, positions + 1):
        assert not np.asarray(nothing).any()
    assert (np.asarray(lse) == -np.inf).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, np.array, jnp.int32, jnp.uint8])
def test_layers_of_all_kinds(stack: CacheState, kind: Callable[[int], Any]) -> None:
    """Python's, NumPy's and JAX's integers name the same layer, and are refused alike."""
    chex.assert_trees_all_equal(
        jaxkv.gather(stack, layer=kind(1)), jax.tree.map(lambda x: x[1], jaxkv.gather(stack))
    )
    for call in (
        lambda layer: jaxkv.append(stack, NEW, NEW, layer=layer),
        lambda layer: jaxkv.attend(stack, QUERY, layer=layer),
        lambda layer: jaxkv.gather(stack, layer=layer),
    ):
        with pytest.raises(ValueError, match=r"layer=5: the state has layers 0 \.\. 1"):
            call(kind(5))


@pytest.mark.parametrize("bad", [1.0, "1", [1], True, np.float32(1), np.array([1]), jnp.ones(())])
def test_what_is_no_layer(stack: CacheState, bad: Any) -> None:
    """Floats, strings, lists and vectors are none."""
    with pytest.raises(ValueError, match=r"layer=.*: must be an int, or an integer scalar"):
        jaxkv.attend(stack, QUERY, layer=bad)


# Numbers of NumPy.


@pytest.mark.slow
def test_numpy_ints_are_ints(state: CacheState) -> None:
    """Configurations, sizes and counts take NumPy's integers, and keep Python's."""
    config = KvCacheConfig(np.int64(4), max_tokens=np.int32(16), num_kv_heads=K, head_dim=H)
    assert config == KvCacheConfig(4, max_tokens=16, num_kv_heads=K, head_dim=H)
    assert type(config.tail_length) is type(config.max_tokens) is int
    assert jaxkv.init(config, np.int64(2), np.int8(3)).end.shape == (3, 2)
    assert int(jaxkv.evict(state, np.array([1, 0, 1])).begin[0]) == 3
    cache = jaxkv.TwoTierKvCache(config)
    cache.append(NEW[0], NEW[0])
    cache.evict(np.int64(2))
    cache.rewind(np.uint8(3))
    assert cache.stats().total_tokens == 4


# Options of attention.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0: must be at least 1 token"),
        ({"window": np.int64(0)}, "window=0: must be at least 1 token"),
        ({"window": -3}, "window=-3: must be at least 1 token"),
        ({"window": jnp.int32(-3)}, "window=-3: must be at least 1 token"),
        ({"window": 2.5}, r"window=2.5: must be an int, or ints, of at least 1 token"),
        ({"window": True}, r"window=True: must be an int, or ints, of at least 1 token"),
        ({"window": "all"}, r"window='all': must be an int, or ints, of at least 1 token"),
        ({"scale": np.ones(K)}, r"scale has shape \(2,\) .* must be a scalar or \[N\], .* \[4\]"),
        ({"scale": "H"}, r"scale has shape \(\) and dtype <U1: must be a scalar or \[N\]"),
        ({"scale": 1j}, "scale has shape .* dtype complex128: must be a scalar or"),
        ({"soft_cap": 0.0}, "soft_cap=0.0: must be positive"),
        ({"soft_cap": np.float32(-2)}, "soft_cap=-2.0: must be positive"),
        ({"soft_cap": np.nan}, "soft_cap=nan: must be positive"),
        ({"soft_cap": np.ones(N)}, r"soft_cap has shape \(4,\) .* must be a scalar"),
        ({"decay": np.ones(K)}, r"decay has shape \(2,\) .* must be a scalar or \[N\]"),
        ({"sink_logits": 1.0}, r"sink_logits has shape \(\) .* must be \[N\], .* \[4\]"),
        ({"sink_logits": np.ones(N, bool)}, "sink_logits has .* dtype bool: must be"),
        ({"causal": 1}, "causal=1: must be True or False"),
        ({"mask": np.ones((B, 1, 2, 9))}, "mask.dtype=float64: must be bool; pass numbers as"),
        ({"mask": np.ones((2, 9), bool)}, r"mask has shape \(2, 9\): must be \[B or 1, "),
        ({"bias": np.ones((B, 1, 2, 9), bool)}, "bias.dtype=bool: must be numbers; pass bools as"),
        ({"bias": np.ones((B, 1, 3, 9))}, r"bias has shape .*: must be .* N=4, T=2"),
    ],
    ids=str,
)
def test_options_are_refused(state: CacheState, options: dict[str, Any], message: str) -> None:
    """Options of the wrong kind, shape or sign, in attend as in prefill."""
    with pytest.raises(ValueError, match=message):
        jaxkv.attend(state, QUERY, **options)
    with pytest.raises(ValueError, match=message):
        jaxkv.prefill(state, QUERY, NEW[:, :2], NEW[:, :2], **options)


@pytest.mark.slow
def test_lists_and_traced_numbers_are_taken(state: CacheState) -> None:
    """Nested lists are arrays; a cap, a scale and a window may be traced."""
    mask = RNG.random((B, 1, 2, 9)) < 0.5
    options = {"mask": mask, "bias": np.where(mask, 0.5, 0.0), "sink_logits": np.arange(N)}
    options |= {"decay": np.full(N, 0.1), "scale": np.full(N, 0.3)}
    lists = {name: array.tolist() for name, array in options.items()}
    attend = jax.jit(lambda **rest: jaxkv.attend(state, QUERY, **options, **rest))
    expected = attend(soft_cap=2.0, window=6)
    np.testing.assert_allclose(
        jax.jit(lambda: jaxkv.attend(state, QUERY, **lists, soft_cap=2.0, window=6))(),
        expected,
        atol=1e-6,  # the cap and the window are constants here
    )
    assert np.asarray(expected).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FP32", "Q8", "Q4"])
def test_derivatives_are_refused(name: str) -> None:
    """With respect to queries and to what enters, forwards and backwards; not where none is
    wanted."""
    config = jaxkv.preset(name, max_tokens=16, num_kv_heads=1, head_dim=8)
    x = jax.random.normal(jax.random.key(0), (1, 3, 1, 8))
    held = jaxkv.append(jaxkv.init(config), x, x)

    def of_query(query: Any) -> Any:
        return jaxkv.attend(held, query).sum()

    def of_tokens(new: Any) -> Any:
        state = jaxkv.append(jaxkv.init(config), new, new)
        return jaxkv.attend(state, x).sum()

    def of_prompt(new: Any) -> Any:
        return jaxkv.prefill(jaxkv.init(config), x, new, new)[1].sum()

    for function in (of_query, of_tokens, of_prompt):
        with pytest.raises(ValueError, match="stop_gradient"):
            jax.grad(function)(x)
        with pytest.raises(ValueError, match="stop_gradient"):
            jax.jit(lambda f=function: jax.jvp(f, (x,), (x,)))()
        stopped = jax.grad(lambda y, f=function: f(jax.lax.stop_gradient(y)) + y.sum())(x)
        assert (np.asarray(stopped) == 1).all()
