"""Other people's JAX flags: every preset runs the same verbs to the same bits and dtypes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import KvCacheConfig
from jaxkv.objects import TwoTierKvCache
from jaxkv.presets import PRESETS

pytestmark = pytest.mark.slow

B, T, K, N, H = 2, 5, 2, 4, 32
SIZES: dict[str, int] = {"max_tokens": 96, "num_kv_heads": K, "head_dim": H, "tail_length": 8}
# A tier of each kind in a row, besides the presets.
THREE = KvCacheConfig(tail_precision="bf16", warm_length=8, sink_tokens=2, window=40, **SIZES)  # type: ignore[arg-type]
CONFIGS = {name: jaxkv.preset(name, **SIZES) for name in PRESETS} | {"three tiers": THREE}
FEW = ("Q4_BIAS", "three tiers")  # compiled
Array = np.ndarray[Any, Any]

STRICT: dict[str, Callable[[], Any]] = {
    "promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
    "leaks": jax.checking_leaks,
}


def inputs() -> tuple[Array, ...]:
    """A query, new tokens of which one is beyond fp16, lengths, a bias and a mask."""
    rng = np.random.default_rng(0)
    query, new = rng.normal(size=(B, T, N, H)), rng.normal(size=(B, T, K, H))
    new[0, 0, 0, 0] = 7e4
    bias, mask = rng.normal(size=(1, 1, T, 20)), rng.random((B, N, T, 20)) < 0.9
    wide = (x.astype(np.float32) for x in (query, new, bias))
    return *wide, mask, np.array([T, 3], np.int32)


def script(
    config: KvCacheConfig,
    query: jax.Array,
    new: jax.Array,
    bias: jax.Array,
    mask: jax.Array,
    lengths: jax.Array,
) -> Any:
    """All verbs of a state, and all options of attention, in one program."""
    state = jaxkv.init(config, B)
    state, first = jaxkv.prefill(state, query, new, new, lengths, return_lse=True)
    state = jax.lax.fori_loop(0, 4, lambda _, held: jaxkv.append(held, new, -new), state)
    outs = [
        jaxkv.attend(state, query, lengths=lengths, return_lse=True),
        jaxkv.attend(state, query, 0.3, soft_cap=30.0, decay=0.1, window=7, bias=bias, mask=mask),
        jaxkv.attend(
            state, query.astype(jnp.bfloat16), causal=False, sink_logits=query[0, 0, :, 0]
        ),
    ]
    state = jaxkv.evict(jaxkv.rewind(state, lengths // lengths), 1)
    layers = jaxkv.init(config, B, num_layers=2)
    layers = jaxkv.append(layers, new, new, layer=lengths[1] // 3)
    outs.append(jaxkv.attend(layers, query, layer=1))
    rows = jaxkv.take_rows(state, lengths // 5)
    rows = jaxkv.replace_rows(rows, 1, jaxkv.init(config, 1))
    states = [state, jaxkv.concatenate([state, rows]), jaxkv.clear(state), layers]
    reads = [[jaxkv.gather(x), jaxkv.stats(x), x.status, x.begin] for x in states]
    return first, outs, states, reads


def program(config: KvCacheConfig) -> Callable[..., Any]:
    """The script of a config, traced anew by each call of this."""
    return lambda *args: jax.tree.leaves(script(config, *args))


def shapes(arrays: Any) -> list[tuple[Any, ...]]:
    return [(x.shape, np.dtype(x.dtype)) for x in arrays]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_verb_is_strict(name: str) -> None:
    """No promotion of dtypes or ranks, no leaked tracer; and 64 bits change no shape or dtype."""
    run, given = program(CONFIGS[name]), inputs()
    with contextlib.ExitStack() as stack:
        for flag in STRICT.values():
            stack.enter_context(flag())
        wanted = shapes(jax.eval_shape(run, *given))
    with jax.enable_x64(True):
        assert shapes(jax.eval_shape(program(CONFIGS[name]), *given)) == wanted
    assert {dtype.itemsize for _, dtype in wanted} <= {1, 2, 4}


@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
)
def test_the_same_bits_with_64_bits(name: str) -> None:
    """Under jax_enable_x64 the compiled script gives what it gives without."""
    given = inputs()
    wanted = jax.jit(program(CONFIGS[name]))(*given)
    with jax.enable_x64(True):
        chex.assert_trees_all_equal(jax.jit(program(CONFIGS[name]))(*given), wanted)


@pytest.mark.parametrize("name", FEW[1:])
def test_no_nan_and_no_silent_transfer(name: str) -> None:
    """Outside jit `init` and `status`, inside it every verb: no NaN comes up, empty rows and
    slots included, and nothing is moved to a device that the caller has not put there."""
    config = dataclasses.replace(CONFIGS[name], rewind_length=1)
    given = jax.device_put(inputs())
    step = jax.jit(lambda state, *args: (state, script(state.config, *args)))
    with jax.transfer_guard("disallow"), jax.debug_nans(True):
        state, _ = step(jaxkv.init(config, B), *given)
        assert state.status.shape == (B,)


def test_objects_move_only_what_they_are_given() -> None:
    """An object called with JAX arrays moves none to the device that is of the caller's making."""
    config = KvCacheConfig(**{**SIZES, "head_dim": 8, "max_tokens": 16})  # type: ignore[arg-type]
    new, query = jax.device_put([np.ones((3, heads, 8), np.float32) for heads in (K, N)])
    with jax.transfer_guard("disallow"):
        cache = TwoTierKvCache.new(config)
        cache.append(new, new)
        cache.attend(query, scale=0.5, decay=0.1)
        cache.rewind(1)
        cache.evict(1)
        assert cache.stats().total_tokens == 1
