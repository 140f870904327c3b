"""Values of another size than keys, and values that are a part of them (latents)."""

from __future__ import annotations

import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, random_query, random_tokens
from laws import gather, given, run, start

import jaxkv
from jaxkv import KvCacheConfig, QuantSpec, TwoTierKvCache, shards
from jaxkv.kernels import dispatch
from jaxkv.scoring import Scoring
from jaxkv.sharding import Axes
from jaxkv.state import segments

LATENT = dict(num_kv_heads=1, head_dim=576, tail_length=0, max_tokens=1024)


@pytest.mark.parametrize("precision", ["q8", "q4"])
def test_latents_are_stored_once(precision: str) -> None:
    """DeepSeek's latents, one head of 576 with values in the first 512, take half of what padded
    values take."""
    once = KvCacheConfig(store_precision=precision, values_from_keys=512, **LATENT)
    padded = KvCacheConfig(store_precision=precision, **LATENT)
    sizes = [jaxkv.nbytes(jaxkv.init(config)) for config in (once, padded)]
    assert sizes[0] <= 0.51 * sizes[1]
    assert jaxkv.init(once).tiers[0].values is None


def test_what_a_config_says_of_values() -> None:
    """Defaults follow each side's own size; contradictions are refused."""
    config = KvCacheConfig(head_dim=192, value_dim=128)
    tier = config.chain[-1]
    assert (tier.key.group_size, tier.value.group_size, config.output_dim) == (64, 64, 128)
    assert KvCacheConfig(head_dim=96, value_dim=80).chain[-1].value.group_size == 40
    for fields, message in (
        ({"value_dim": 0}, "value_dim=0: must be an int of at least 1"),
        ({"values_from_keys": 200}, "values_from_keys=200: keys have head_dim=128 elements"),
        ({"values_from_keys": 64, "value_dim": 64}, "leave value_dim and value_quant out"),
        ({"values_from_keys": 64, "value_quant": QuantSpec(4)}, "leave value_dim and value_quant"),
        ({"value_dim": 80, "value_quant": QuantSpec(4, 64)}, "must divide value_dim=80"),
    ):
        with pytest.raises(ValueError, match=message):
            KvCacheConfig(**fields)


def test_values_that_do_not_fit(rng: np.random.Generator) -> None:
    """Values of the keys' size, or values at all, are refused where the config says otherwise."""
    for name, message in (
        ("fp16_q4_values24", r"values.shape=\(3, 5, 2, 32\): must be \[B, T, K, V\]"),
        ("latent_q4", "values_from_keys: values are a part of the keys; pass values=None"),
    ):
        keys = random_tokens(rng, CASES[name], 5)[0]
        state = start(CASES[name])
        with pytest.raises(ValueError, match=message):
            jaxkv.append(state, keys, keys)
        with pytest.raises(ValueError, match=message):
            jaxkv.extend(state, keys, keys, keys)
    with pytest.raises(ValueError, match="values is a NoneType"):
        jaxkv.append(start(CASES["fp32"]), random_tokens(rng, CASES["fp32"], 5)[0], None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latent_q4", "fp16_q4_values24"])
def test_on_disk_and_in_shards(name: str, tmp_path: pathlib.Path, rng: np.random.Generator) -> None:
    """Files and shards hold what the state holds."""
    case = CASES[name]
    state = run(case).states[4]
    jaxkv.save(tmp_path / "state.safetensors", state)
    loaded = jaxkv.load(tmp_path / "state.safetensors", config=case.config)
    chex.assert_trees_all_equal(gather(loaded), gather(state))
    mesh = jax.make_mesh((1,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    axes = Axes(batch="b")
    held = shards.init(case.config, 3, mesh=mesh, axes=axes)
    keys, values = random_tokens(rng, case, 20)
    query, spec = random_query(rng, case, 20), axes.tokens

    def step(held: Any, query: Any, keys: Any, values: Any) -> Any:
        return shards.prefill(held, query, keys, given(case.config, values))

    sharded = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(held.specs, spec, spec, spec), out_specs=(held.specs, spec)
        )
    )
    _, out = sharded(held, query, keys, values)
    expected = jax.jit(jaxkv.prefill)(start(case), query, keys, given(case.config, values))[1]
    assert out.shape == (3, 20, case.num_heads, case.config.output_dim)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latent_q4", "fp16_q4_values24"])
def test_as_an_object(name: str, rng: np.random.Generator) -> None:
    """The object takes and gives values of their own size, flat and shaped, and moves them to
    another policy."""
    case = CASES[name]
    cache = TwoTierKvCache.new(case.config)
    keys, values = (x[0] for x in random_tokens(rng, case, 12))
    state = jaxkv.append(jaxkv.init(case.config), keys[None], given(case.config, values[None]))
    cache.append(keys, given(case.config, values))
    for mine, theirs in zip(cache.get_all_kv(), jaxkv.gather(state), strict=False):
        np.testing.assert_array_equal(mine, np.asarray(theirs)[0, :12])
    query = random_query(rng, case, 1)[0, 0]
    expected = jaxkv.attend(state, query[None, None])[0, 0]
    assert expected.shape == (case.num_heads, case.config.output_dim)
    np.testing.assert_allclose(cache.attend(query), expected, atol=1e-5)
    np.testing.assert_allclose(cache.attend(query.ravel()), expected.ravel(), atol=1e-5)
    stats = cache.stats()
    cache.update_policy(jaxkv.CacheQuantization.HighPrecisionTail(12))
    assert cache.stats().total_tokens == stats.total_tokens


@pytest.mark.slow
def test_the_kernel_says_why() -> None:
    """What the GPU kernel cannot read goes to XLA, and it says why."""
    for name, reason in (("latent_q4", "part of them"), ("fp16_q4_values24", "value_dim=24")):
        part = segments(jaxkv.init(CASES[name].config))[-1]
        found = dispatch.refusal(part, CASES[name].config.head_dim, Scoring())
        assert found is not None and reason in found
    assert jnp.shape(jaxkv.attend(jaxkv.init(CASES["latent_q4"].config), jnp.zeros((1, 2, 4, 40)))) == (
        1, 2, 4, 32)  # fmt: skip
