"""However a program is put together, it computes the same: jit, scan, vmap, shards, batches,
layers; and shapes never change."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CASES,
    FEW,
    REWINDS,
    TOLERANCE,
    Array,
    Case,
    random_query,
    random_tokens,
)
from jax import lax
from jax.sharding import PartitionSpec
from laws import (
    IN_CI,
    append,
    assert_same,
    assert_within,
    attend,
    evict,
    exact_attention,
    extend,
    gather,
    given,
    over,
    prefill,
    run,
    start,
    stats,
    take_rows,
)

import jaxkv
from jaxkv import CacheState, KvCacheConfig, QuantSpec, codec

over_few = over(FEW, fast=(), slow=("channel_keys", "bf16_q8_q4_batched_sinks"))

# 5. However the program is put together.


@over({"bf16_q4_all_heads": FEW["bf16_q4_all_heads"]})
def test_jit_changes_nothing(case: Case, rng: np.random.Generator) -> None:
    """jit == no jit: the same bits are stored, and outputs are equal but for rounding."""
    keys, values = random_tokens(rng, case, 12)
    plain, compiled, query = start(case), start(case), random_query(rng, case, 1)
    for first, size in ((0, 7), (7, 5)):
        new = keys[:, first : first + size], values[:, first : first + size]
        plain, compiled = jaxkv.append(plain, *map(jnp.asarray, new)), append(compiled, *new)
    assert_same(plain, compiled)
    chex.assert_trees_all_equal(jaxkv.gather(plain), gather(plain))
    chex.assert_trees_all_close(jaxkv.stats(plain), stats(plain), rtol=2 * TOLERANCE["float32"])
    expected, bound = exact_attention(plain, query)
    assert_within(np.abs(np.asarray(jaxkv.attend(plain, query)) - expected), bound)


@over_few
def test_scan_is_a_loop(case: Case, rng: np.random.Generator) -> None:
    """Steps of append and attend in a scan, the state in its carry == the same steps one by one."""
    keys, values = (np.moveaxis(x, 1, 0)[:, :, None] for x in random_tokens(rng, case, 24))
    queries = np.stack([random_query(rng, case, 1) for _ in range(24)])

    def step(state: CacheState, new: tuple[Array, Array, Array]) -> tuple[CacheState, jax.Array]:
        state = jaxkv.append(state, new[0], new[1])
        return state, jaxkv.attend(state, new[2])

    scanned, outs = jax.jit(functools.partial(lax.scan, step))(start(case), (keys, values, queries))
    looped = start(case)
    for key, value, query, out in zip(keys, values, queries, outs, strict=True):
        looped = append(looped, key, value)
        expected, bound = exact_attention(looped, query)
        assert_within(np.abs(out - expected), bound)
    assert_same(scanned, looped)


@over_few
def test_batch_is_its_rows_alone(case: Case, rng: np.random.Generator) -> None:
    """A batch holds what its rows hold in batches of one, and attends to them alike but for
    rounding."""
    query, state = random_query(rng, case), run(case).states[-1]
    for b in range(case.batch_size):
        alone = extend(
            jaxkv.init(case.config, 1), run(case).keys[b : b + 1], run(case).values[b : b + 1]
        )
        chex.assert_trees_all_equal([x[b] for x in gather(state)], [x[0] for x in gather(alone)])
        expected, bound = exact_attention(alone, query[b : b + 1])
        assert_within(np.abs(attend(state, query)[b] - expected[0]), bound[0])


@over_few
def test_vmap_is_a_loop(case: Case, rng: np.random.Generator) -> None:
    """vmap over a stack of states == each by itself."""
    keys, values = np.stack([random_tokens(rng, case, 30) for _ in range(2)], axis=1)
    states = [extend(start(case), keys[i, :, :25], values[i, :, :25]) for i in range(2)]
    query = np.stack([random_query(rng, case, 1) for _ in range(2)])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    mapped = jax.jit(jax.vmap(jaxkv.append))(stacked, keys[:, :, 25:], values[:, :, 25:])
    outs = jax.jit(jax.vmap(jaxkv.attend))(mapped, query)
    for i in range(2):
        alone = append(states[i], keys[i, :, 25:], values[i, :, 25:])
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], mapped), alone)
        expected, bound = exact_attention(alone, query[i])
        assert_within(np.abs(outs[i] - expected), bound)


@over(
    {name: FEW[name] for name in ("bf16_q4_all_heads", "channel_keys", "bf16_q8_q4_batched_sinks")},
    fast=(),
    slow=("channel_keys", "bf16_q8_q4_batched_sinks"),
)
def test_shards_of_a_batch(case: Case, rng: np.random.Generator) -> None:
    """With the rows spread over devices, each device keeps its own, as one device would keep
    all."""
    case = dataclasses.replace(case, batch_size=4)
    keys, values = random_tokens(rng, case, 6)
    query, rows = random_query(rng, case, 1), PartitionSpec("rows")

    def step(
        state: CacheState, keys: Array, values: Array, query: Array
    ) -> tuple[CacheState, jax.Array]:
        state = jaxkv.append(state, keys, values)
        return state, jaxkv.attend(state, query)

    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=rows, out_specs=rows))
    state, alone = start(case), start(case)
    for _ in range(4):
        state, out = sharded(state, keys, values, query)
        alone = jax.jit(step)(alone, keys, values, query)[0]
    assert_same(jax.device_get(state), alone)
    expected, bound = exact_attention(alone, query)
    assert_within(np.abs(out - expected), bound)


# 6. Nothing about a state changes but its numbers.


VERBS: dict[str, Callable[..., CacheState]] = {
    "append": lambda state, new: jaxkv.append(state, new, given(state.config, new)),
    "prefill": lambda state, new: jaxkv.prefill(state, new, new, given(state.config, new))[0],
    "migrate": lambda state, new: jaxkv.migrate(state),
    "evict": lambda state, new: jaxkv.evict(state, jnp.zeros((), jnp.int32) + 2),
    "rewind": lambda state, new: jaxkv.rewind(state, jnp.ones(state.batch_size, jnp.int32)),
    "clear": lambda state, new: jaxkv.clear(state),
    "take_rows": lambda state, new: jaxkv.take_rows(state, np.arange(state.batch_size)),
}


@over(FEW | REWINDS, fast=(), slow=("channel_keys", "rewind_fp32_q8_q2_sinks"))
def test_shapes_never_change(case: Case) -> None:
    """Every verb returns the tree, the shapes and the dtypes that it got."""
    states = run(case).states
    chex.assert_trees_all_equal_shapes_and_dtypes(*states)
    new = run(case).keys[:, :3]
    for verb in VERBS.values():
        after = jax.eval_shape(verb, states[-1], new)
        chex.assert_trees_all_equal_structs(after, states[-1])
        chex.assert_trees_all_equal_shapes_and_dtypes(after, states[-1])
        weak = [leaf.weak_type for leaf in jax.tree.leaves(after)]
        assert not any(weak), "a weakly typed leaf would be a second program"


PRESET_CASES = {
    name: dataclasses.replace(CASES["fp32"], name=name, config=jaxkv.preset(name))
    for name in jaxkv.PRESETS
}


@over(CASES | PRESET_CASES, fast=(), slow=(*IN_CI, *PRESET_CASES))
def test_zeros_are_the_empty_cache(case: Case) -> None:
    """A tree of zeros, as some checkpoints and modules make one, is what `init` and `clear` give,
    bit for bit."""
    shapes = jax.eval_shape(lambda: jaxkv.init(case.config, case.batch_size, num_layers=2))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    chex.assert_trees_all_equal(zeros, jaxkv.init(case.config, case.batch_size, num_layers=2))
    if case.name in CASES:
        cleared = jaxkv.clear(run(case).states[-1])
        empty = start(case)
        assert (cleared.end == empty.end).all() and (cleared.lost == empty.lost).all()


@over_few
def test_one_trace_for_a_whole_run(case: Case) -> None:
    """Filling, wrapping, evicting, rewinding and clearing trace each verb once."""
    verbs = {}
    for name, verb in VERBS.items():
        verb.__name__ = name
        verbs[name] = jax.jit(chex.assert_max_traces(verb, n=1))
    state, new = start(case), run(case).keys[:, :3]
    for round_ in range(8):
        for name in (
            "append",
            "append",
            "append",
            "prefill",
            "evict",
            "rewind",
            "migrate",
            "take_rows",
        ):
            state = verbs[name](state, new)
        if round_ == 5:
            state = verbs["clear"](state, new)
    assert not state.status.any()


@over_few
def test_layers_of_a_stack(case: Case, rng: np.random.Generator) -> None:
    """A scan over layers with the stacked state in the carry == a list of states, one per layer."""
    layers = 3
    stack = jaxkv.init(case.config, case.batch_size, num_layers=layers)
    states = [start(case) for _ in range(layers)]

    @jax.jit
    def step(
        stack: CacheState, keys: Array, values: Array, query: Array
    ) -> tuple[CacheState, jax.Array]:
        def layer(stack: CacheState, xs: Any) -> tuple[CacheState, jax.Array]:
            index, key, value, query = xs
            stack = jaxkv.append(stack, key, value, layer=index)
            return stack, jaxkv.attend(stack, query, layer=index)

        return lax.scan(layer, stack, (jnp.arange(layers), keys, values, query))

    for _ in range(24):
        keys, values = np.stack([random_tokens(rng, case, 1) for _ in range(layers)], axis=1)
        query = np.stack([random_query(rng, case, 1) for _ in range(layers)])
        stack, outs = step(stack, keys, values, query)
        states = [append(state, keys[i], values[i]) for i, state in enumerate(states)]
    drop = np.full(case.batch_size, 2, np.int32)
    for change in (
        lambda state: state,
        lambda state: evict(state, drop),
        lambda state: take_rows(state, np.array([0])),
    ):
        changed = change(stack)
        for i, state in enumerate(states):
            chex.assert_trees_all_equal(
                jax.tree.map(lambda x, i=i: x[i], gather(changed)), gather(change(state))
            )
            chex.assert_trees_all_equal(gather(changed, layer=i), gather(change(state)))
            chex.assert_trees_all_equal(
                stats(changed).tail_tokens[i], stats(change(state)).tail_tokens
            )
    for i, state in enumerate(states):
        expected, bound = exact_attention(state, query[i])
        assert_within(np.abs(outs[i] - expected), bound)


@pytest.mark.slow
def test_layers_prefill_one_by_one(rng: np.random.Generator) -> None:
    """prefill with `layer` fills that layer alone, int or traced."""
    case = CASES["fp16_q4"]
    stack = jaxkv.init(case.config, case.batch_size, num_layers=2)
    keys, values = random_tokens(rng, case, 5)
    query = random_query(rng, case)
    alone, expected = prefill(start(case), query, keys, values)
    for layer in (1, jnp.int32(1)):
        filled, out = prefill(stack, query, keys, values, layer=layer)
        chex.assert_trees_all_equal(jaxkv.gather(filled, layer=1), gather(alone))
        assert not stats(filled).total_tokens[0].any()
        chex.assert_trees_all_close(out, expected, atol=1e-5)


SPECS = [
    QuantSpec(4, 64),
    QuantSpec(2, 32),
    QuantSpec(8, 64),
    QuantSpec(4, 32, two_level=True),
    QuantSpec(4, 24),
    QuantSpec(4, 1024),
]


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.bits}_{spec.group_size}")
def test_codes_are_the_same_in_every_program(spec: QuantSpec, rng: np.random.Generator) -> None:
    """Op by op and fused: the same codes and scales of 4,000 groups and more. (A last bit in one of
    10,000 was lost once.)"""
    head_dim = 48 if spec.group_size == 24 else 128
    x = jnp.asarray(rng.normal(size=(1, 1024, 8, head_dim)), jnp.float32)
    quantize = functools.partial(codec.quantize, spec)
    chex.assert_trees_all_equal(jax.jit(quantize)(x), quantize(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", [QuantSpec(8, 64), QuantSpec(4, 32, two_level=True)], ids=["q8", "two_level"]
)
def test_a_token_of_zeros_spoils_no_other(spec: QuantSpec, rng: np.random.Generator) -> None:
    """Small numbers beside a token, and a head, without extent keep their accuracy."""
    config = KvCacheConfig(
        0, max_tokens=256, num_kv_heads=2, head_dim=64, key_quant=spec, value_quant=spec
    )
    keys, values = (rng.normal(size=(1, 256, 2, 64)).astype(np.float32) for _ in range(2))
    values *= 1e-3
    values[:, 7], values[:, :, 1] = 0, 0
    state = append(jaxkv.init(config, 1), keys, values)
    held = np.asarray(gather(state)[1])
    assert np.abs(held - values).max() <= np.abs(values).max() * (2 / (2**spec.bits - 1))
    query = rng.normal(size=(1, 1, 2, 64)).astype(np.float32)
    expected, _ = exact_attention(state, query)
    assert np.abs(attend(state, query) - expected).max() <= 2.0**-16 * np.abs(values).max()
