"""On CPUs the queries of a prompt go tile by tile over blocks of one row and kv head: the same
results, in memory that does not grow with their product.

Tiles and blocks are made small here, so that a dozen tokens have several.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_laws_attend
import test_scoring
from cases import CASES, Case, random_query, random_tokens
from jax.sharding import AxisType
from laws import IN_CI, assert_same, assert_within, exact_attention, extend, given, over, start

import jaxkv
from jaxkv import KvCacheConfig, platform, shards
from jaxkv.kernels import dispatch, flash
from jaxkv.sharding import Axes

SOME = {
    name: CASES[name] for name in ("bf16_q4_all_heads", "channel_keys", "bf16_q8_q4_batched_sinks")
}


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("LEAST", 1), ("ROWS", 4), ("SLOTS", 8)):
        monkeypatch.setattr(flash, name, size)
    monkeypatch.setattr(platform, "visits_rows", lambda: True)


@pytest.mark.usefixtures("tiled")
@over(CASES, fast=(), slow=IN_CI)
def test_every_format_is_attended_exactly(case: Case, rng: np.random.Generator) -> None:
    keys, values = random_tokens(rng, case, 60)
    lengths = np.arange(case.batch_size, dtype=np.int32) % 6
    state = extend(start(case), keys, values)
    state = jaxkv.append(state, keys[:, :5], given(case.config, values[:, :5]), lengths)
    query = random_query(rng, case, 5)
    expected, bound = exact_attention(state, query, lengths)
    attend = jax.jit(lambda state, query: jaxkv.attend(state, query, lengths=lengths))
    assert_within(np.abs(np.asarray(attend(state, query)) - expected), bound)


@pytest.mark.usefixtures("tiled")
@over(SOME, fast=("bf16_q4_all_heads",))
def test_empty_slots_have_no_influence(case: Case, rng: np.random.Generator) -> None:
    """Chunks of five, each into a cache full of NaN but for what it holds."""
    test_laws_attend.test_empty_slots_never_reach_an_output(case, np.nan, -1, rng)


@pytest.mark.slow
@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("option", ["cross", "all", "window_soft_cap", "decay", "bias", "mask"])
def test_tiles_have_their_own_options(option: str) -> None:
    """Tables by row, head and query, windows, decay by head, caps and sink logits."""
    test_scoring.check("chain", test_scoring.options(option))


@pytest.mark.slow
@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("option", ["all", "none"])
def test_prompts_are_attended_with_what_is_held(option: str) -> None:
    test_scoring.test_prefill_has_the_options(option)


@pytest.mark.slow
@pytest.mark.usefixtures("tiled")
def test_windows_skip_blocks_and_sinks_stay() -> None:
    test_scoring.test_window_keeps_the_sinks()
    test_scoring.test_window_of_the_config()


@pytest.mark.slow
@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_hidden_values_stay_hidden(dtype: Any, rng: np.random.Generator) -> None:
    """NaN and inf in raw tokens behind a row's length, or after a query, change no output."""
    config = KvCacheConfig(tail_length=8, max_tokens=64, num_kv_heads=2, head_dim=16)
    query, keys, values = (
        jnp.asarray(rng.normal(size=(2, 12, heads, 16)), dtype) for heads in (4, 2, 2)
    )
    lengths = np.array([12, 7], np.int32)
    prefill = jax.jit(lambda *args: jaxkv.prefill(jaxkv.init(config, 2), *args, lengths)[1])
    expected = prefill(query, keys, values)
    spoiled = (keys.at[:, 11].set(jnp.nan), values.at[0, 11].set(jnp.inf).at[1, 8].set(jnp.nan))
    found = prefill(query, *spoiled)
    np.testing.assert_array_equal(found[0, :11], expected[0, :11])
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("scale", [None, -0.7])
def test_prompts_of_bfloat16_lose_only_their_weights_rounding(
    scale: float | None, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Scores are exact; a weight, and an output, is off by 2**-9 of itself at most."""
    config = KvCacheConfig(tail_length=8, max_tokens=64, num_kv_heads=2, head_dim=16)
    query, keys, values = (
        jnp.asarray(rng.normal(size=(1, 24, heads, 16)), jnp.bfloat16) for heads in (4, 2, 2)
    )
    found = []
    for has_units in (False, True):
        monkeypatch.setattr(platform, "multiplies_bfloat16", lambda has_units=has_units: has_units)
        prefill = jax.jit(lambda *args: jaxkv.prefill(*args, scale=scale, return_lse=True)[1])
        found.append(prefill(jaxkv.init(config), query, keys, values))
    (exact, lse), (rounded, narrow_lse) = found
    np.testing.assert_allclose(narrow_lse, lse, rtol=1e-6, atol=1e-6)
    bound = 2.0**-9 * (np.abs(np.asarray(values, np.float32)).max() + 2 * np.abs(exact)) + 1e-5
    assert_within(np.abs(np.asarray(rounded, np.float32) - np.asarray(exact, np.float32)), bound)
    assert (rounded != exact).any()  # the other way was taken


@pytest.mark.slow
@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("axes", [Axes(heads="core"), Axes(context="core")], ids=str)
def test_devices_have_their_own_tiles(axes: Axes, rng: np.random.Generator) -> None:
    """A prompt and a chunk after it, heads or positions dealt to two devices, with a window."""
    config = KvCacheConfig(16, store_precision="fp32", max_tokens=64, num_kv_heads=2, head_dim=16)
    mesh = jax.make_mesh((2,), ("core",), axis_types=(AxisType.Auto,))
    dealt, state = shards.init(config, 1, mesh=mesh, axes=axes), jaxkv.init(config, 1)
    specs = dealt.specs, axes.tokens
    prompt = jax.shard_map(
        lambda *args: shards.prefill(*args, window=9),
        mesh=mesh,
        in_specs=(specs[0], *[specs[1]] * 3),
        out_specs=specs,
    )
    for length in (20, 14):
        new = [
            jnp.asarray(rng.normal(size=(1, length, heads, 16)), jnp.float32) for heads in (4, 2, 2)
        ]
        dealt, apart = jax.jit(prompt)(dealt, *new)
        state, together = jaxkv.prefill(state, *new, window=9)
        np.testing.assert_allclose(apart, together, atol=2e-3)  # the tail is 16-bit


@over(SOME, fast=())
def test_a_prompt_may_enter_in_blocks(
    case: Case, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged rows, bit for bit as at once."""
    keys, values = random_tokens(rng, case, 75)
    lengths = 75 - 20 * np.arange(case.batch_size, dtype=np.int32)
    whole = jaxkv.append(start(case), keys, values, lengths)
    monkeypatch.setattr(dispatch, "AT_ONCE", 1)
    assert_same(jaxkv.append(start(case), keys, values, lengths), whole)


@pytest.mark.slow
def test_memory_does_not_grow_with_queries_times_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the prompt takes no more than four times the temporaries (16 times, were scores
    held)."""
    monkeypatch.setattr(platform, "visits_rows", lambda: True)

    def megabytes(length: int) -> float:
        config = KvCacheConfig(max_tokens=16384)
        new = [jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16) for heads in (32, 8, 8)]
        state = jax.eval_shape(lambda: jaxkv.init(config))
        prefill = jax.jit(lambda *args: jaxkv.prefill(*args), donate_argnums=0)
        program = prefill.lower(state, *new).compile()
        return float(program.memory_analysis().temp_size_in_bytes) / 2**20

    assert megabytes(4096) <= 4 * megabytes(1024) + 8
