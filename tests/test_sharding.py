"""Caches on eight simulated devices: what one device would hold and answer, without gathering the
cache anywhere."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import chex
import jax
import numpy as np
import pytest
from cases import Array, attention_bound
from jax.sharding import AxisType, Mesh, PartitionSpec

import jaxkv
from jaxkv import (
    CacheState,
    KvCacheConfig,
    Migration,
    QuantSpec,
    reference,
    sharding,
    shards,
    softmax,
)
from jaxkv.sharding import Axes
from jaxkv.shards import Shards

pytestmark = pytest.mark.slow

B, N, K, H = 4, 8, 4, 32
ROWS_AND_HEADS, ALL = Axes("batch", "heads"), Axes("batch", "heads", "context")
SIZES: dict[str, Any] = {
    "tail_length": 8,
    "max_tokens": 64,
    "num_kv_heads": K,
    "head_dim": H,
    "sink_tokens": 4,
}
Q4 = jaxkv.preset("q4_sinks", **SIZES, rewind_length=4)
Q4K = jaxkv.preset("q4k", **SIZES)
CHANNEL = KvCacheConfig(
    **SIZES,
    migration=Migration.BATCHED,
    migration_batch=8,
    key_quant=QuantSpec(4, 4, axis="channel"),
)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
append, attend = jit(jaxkv.append), jit(jaxkv.attend)


def mesh_of(axes: Axes, kind: AxisType = AxisType.Auto) -> Mesh:
    """All eight devices: 2 x 4 for rows and heads, 2 x 2 x 2 with the context."""
    names = tuple(name for name in (axes.batch, axes.heads, axes.context) if name is not None)
    return jax.make_mesh(
        (2, 2, 2) if len(names) == 3 else (2, 4), names, axis_types=(kind,) * len(names)
    )


def random_tokens(seed: int, size: int = 8) -> tuple[Array, Array]:
    keys, values = np.random.default_rng(seed).normal(size=(2, B, size, K, H)).astype(np.float32)
    return keys, values


def random_query(size: int = 3) -> Array:
    return np.random.default_rng(1).normal(size=(B, size, N, H)).astype(np.float32)


LENGTHS = [
    np.array(lengths, np.int32)
    for lengths in ([8, 8, 8, 8], [8, 3, 0, 7], [8, 8, 8, 8], [1, 8, 5, 2])
] * 3


def held(state: CacheState) -> Any:
    return jax.device_get(jit(jaxkv.gather)(jax.device_get(state)))


# Rows and heads, under jit.


@functools.cache
def alone(config: KvCacheConfig) -> CacheState:
    """After all LENGTHS, on one device."""
    state = jaxkv.init(config, B)
    for i, lengths in enumerate(LENGTHS):
        state = append(state, *random_tokens(i), lengths)
    return state


@pytest.mark.parametrize(
    "config", [Q4, pytest.param(CHANNEL, marks=pytest.mark.slow)], ids=["q4", "channel"]
)
def test_a_placed_state_works_with_every_verb(config: KvCacheConfig) -> None:
    """Automatic axes: the same bits as on one device, spread as `place` did."""
    mesh = mesh_of(ROWS_AND_HEADS)
    state = sharding.place(jaxkv.init(config, B), mesh, ROWS_AND_HEADS)
    spread = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jit(jaxkv.append, out_shardings=spread)
    for i, lengths in enumerate(LENGTHS):
        state = step(state, *random_tokens(i), lengths)
    chex.assert_trees_all_equal(held(state), held(alone(config)))
    largest = state.tiers[-1].keys.data
    assert largest.sharding.shard_shape(largest.shape)[:2] == (B // 2, K // 4)
    out = attend(state, random_query())
    assert out.sharding.is_equivalent_to(jax.NamedSharding(mesh, ROWS_AND_HEADS.tokens), out.ndim)
    np.testing.assert_allclose(out, attend(alone(config), random_query()), atol=1e-5)


@pytest.mark.slow
def test_explicit_axes() -> None:
    """On a mesh of explicit axes a verb is wrapped in `auto_axes`, with the sharding of what it
    gives."""
    mesh = mesh_of(ROWS_AND_HEADS, AxisType.Explicit)
    with jax.set_mesh(mesh):
        state = sharding.place(alone(Q4), mesh, ROWS_AND_HEADS)
        spread = sharding.shardings(sharding.specs(state, ROWS_AND_HEADS), mesh)
        place = functools.partial(
            jax.device_put, device=jax.NamedSharding(mesh, ROWS_AND_HEADS.tokens)
        )
        after = jit(jax.sharding.auto_axes(jaxkv.append, out_sharding=spread))(
            state, *map(place, random_tokens(99))
        )
        out = jit(jax.sharding.auto_axes(jaxkv.attend, out_sharding=ROWS_AND_HEADS.tokens))(
            after, place(random_query())
        )
        assert jax.typeof(out).sharding.spec == PartitionSpec("batch", None, "heads", None)
    expected = append(alone(Q4), *random_tokens(99))
    chex.assert_trees_all_equal(held(after), held(expected))
    np.testing.assert_allclose(out, attend(expected, random_query()), atol=1e-5)


@pytest.mark.slow
def test_shard_map_over_rows_and_heads() -> None:
    """`shards` without a context axis: no communication at all, and the same bits."""
    mesh = mesh_of(ROWS_AND_HEADS)
    state = shards.init(Q4, B, mesh=mesh, axes=ROWS_AND_HEADS)
    verbs = Verbs(mesh, state)
    for i, lengths in enumerate(LENGTHS):
        state = verbs.append(state, *random_tokens(i), lengths)
    whole = alone(Q4)
    for actual, expected in zip(
        jax.tree.leaves(state.cache.tiers), jax.tree.leaves(whole.tiers), strict=True
    ):
        np.testing.assert_array_equal(actual[0], expected)
    np.testing.assert_allclose(
        verbs.attend(state, random_query()), attend(whole, random_query()), atol=1e-5
    )
    for verb, args in (
        (verbs.append, (*random_tokens(0), LENGTHS[0])),
        (verbs.attend, (random_query(),)),
    ):
        assert not list(collectives(verb.lower(state, *args).compile().as_text()))


# The context too, under shard_map.


class Verbs:
    """The verbs of `shards`, each mapped over a mesh and compiled."""

    def __init__(self, mesh: Mesh, state: Shards) -> None:
        axes, specs = state.axes, state.specs

        def mapped(verb: Any, *ins: PartitionSpec, out: Any = specs) -> Any:
            return jit(jax.shard_map(verb, mesh=mesh, in_specs=(specs, *ins), out_specs=out))

        tokens, rows = axes.tokens, axes.rows
        self.append = mapped(shards.append, tokens, tokens, rows)
        self.attend = mapped(shards.attend, tokens, out=tokens)
        self.prefill = mapped(shards.prefill, tokens, tokens, tokens, rows, out=(specs, tokens))
        self.evict, self.rewind = mapped(shards.evict, rows), mapped(shards.rewind, rows)
        per_row = PartitionSpec(axes.batch, axes.context, axes.heads)
        self._gather = mapped(
            shards.gather, out=(per_row, per_row, PartitionSpec(axes.batch, axes.context))
        )
        options = {"window": 20, "soft_cap": 5.0, "decay": 0.05, "return_lse": True}
        with_options = functools.partial(shards.attend, **options)
        self.options, self.attend_with_options = (
            options,
            mapped(with_options, tokens, out=(tokens, tokens)),
        )

    def held(self, state: Shards, row: int) -> dict[int, Array]:
        """Key and value [2, K, H] of all positions that a row has on any device."""
        keys, values, positions = (np.asarray(x)[row] for x in self._gather(state))
        found = {int(p): np.stack([keys[i], values[i]]) for i, p in enumerate(positions) if p >= 0}
        assert len(found) == (positions >= 0).sum()  # none on two devices
        return dict(sorted(found.items()))


@functools.cache
def dealt(config: KvCacheConfig) -> tuple[Shards, Verbs]:
    """After all LENGTHS, on 2 x 2 x 2 devices."""
    mesh = mesh_of(ALL)
    state = shards.init(config, B, mesh=mesh, axes=ALL)
    verbs = Verbs(mesh, state)
    for i, lengths in enumerate(LENGTHS):
        state = verbs.append(state, *random_tokens(i), lengths)
    return state, verbs


def exact(state: Shards, verbs: Verbs, query: Array, **given: Any) -> tuple[Array, Array, float]:
    """Attention in float64 over what the devices hold together, or held when each query's token was
    the newest; log-sum-exps; the rounding allowed."""
    size = query.shape[1]
    then = [verbs.rewind(state, np.full(B, size - 1 - t, np.int32)) for t in range(size)]
    options = reference.Options(**given)
    out, lse, bound = np.zeros(query.shape), np.zeros(query.shape[:3]), 0.0
    sinks = state.cache.config.sink_tokens * 2
    for row in range(B):
        for t in range(size):
            tokens, at = verbs.held(then[t], row), int(state.end[row]) - size + t
            seen = [p for p in tokens if options.sees(row, t, at, p, sinks)]
            pairs = np.array([tokens[p] for p in seen])
            added = options.added(row, t, at, seen, N)
            out[row, t], lse[row, t] = reference.attention_and_lse(
                query[row, t], pairs, None, added, options
            )
            bound = max(bound, attention_bound(query[row, t], pairs))
    return out, lse, bound


@pytest.mark.parametrize(
    "config",
    [Q4, pytest.param(Q4K, marks=pytest.mark.slow), pytest.param(CHANNEL, marks=pytest.mark.slow)],
)
def test_context_parallel_attention(config: KvCacheConfig) -> None:
    """Positions dealt out over devices: together they hold what one would, and attend to all of
    it."""
    state, verbs = dealt(config)
    ends = np.sum(LENGTHS, axis=0)
    np.testing.assert_array_equal(state.end, ends)
    for row in range(B):
        positions = list(verbs.held(state, row))
        assert positions[:4] == [0, 1, 2, 3]
        assert positions[4:] == list(range(max(4, ends[row] - 60), ends[row]))
    expected, _, bound = exact(state, verbs, random_query())
    assert np.abs(verbs.attend(state, random_query()) - expected).max() <= bound


def test_stats_clear_and_concatenate_of_shards() -> None:
    """Counts and bytes are those of one device's cache of all; cleared rows are empty, the others
    as they were; two batches are one."""
    state, verbs = dealt(Q4)
    mesh, specs = mesh_of(ALL), state.specs
    rows = jax.tree.map(lambda _: ALL.rows, jaxkv.stats(state.cache))
    scalars = {"tail_bytes": PartitionSpec(), "store_bytes": PartitionSpec()}
    out = dataclasses.replace(rows, compression_ratio=PartitionSpec(), **scalars)
    stats = jit(jax.shard_map(shards.stats, mesh=mesh, in_specs=(specs,), out_specs=out))
    alone = jaxkv.init(Q4, B)
    for i, lengths in enumerate(LENGTHS):
        alone = append(alone, *random_tokens(i), lengths)
    found, wanted = stats(state), jaxkv.stats(alone)
    np.testing.assert_array_equal(found.total_tokens, wanted.total_tokens)
    np.testing.assert_array_equal(found.tail_tokens, wanted.tail_tokens)
    for name in ("tail_bytes", "store_bytes", "compression_ratio"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-5)
    cleared = jit(shards.clear)(state, np.array([0, 3]))
    np.testing.assert_array_equal(cleared.end, np.where([1, 0, 0, 1], 0, state.end))
    for row, gone in enumerate((True, False, False, True)):
        held, before = verbs.held(cleared, row), verbs.held(state, row)
        assert held.keys() == (set() if gone else before.keys())
        assert all((pair == before[position]).all() for position, pair in held.items())
    both = jit(lambda a, b: shards.concatenate([a, b]))(state, cleared)
    np.testing.assert_array_equal(both.end, np.concatenate([state.end, cleared.end]))
    gathered = Verbs(mesh, both)
    for row in range(2 * B):
        wanted_row = verbs.held((state, cleared)[row // B], row % B)
        held = gathered.held(both, row)
        assert held.keys() == wanted_row.keys()
        assert all((pair == wanted_row[position]).all() for position, pair in held.items())
    with pytest.raises(ValueError, match="got no shards"):
        shards.concatenate([])
    assert jaxkv.nbytes(state) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("gathered", [softmax.GATHERED, 0])
def test_context_parallel_options(gathered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, caps and decays count whole positions, not a device's own; sinks are all devices'
    sinks. Merged in one exchange or two."""
    monkeypatch.setattr(softmax, "GATHERED", gathered)
    state, _ = dealt(Q4)
    verbs = Verbs(mesh_of(ALL), state)
    out, lse = verbs.attend_with_options(state, random_query())
    given = {name: value for name, value in verbs.options.items() if name != "return_lse"}
    expected, expected_lse, _ = exact(state, verbs, random_query(), **given)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


def test_context_parallel_prefill() -> None:
    """Exact on the raw prompt, wherever its tokens go, without what its tokens evict one by one;
    then the same append."""
    state, verbs = dealt(Q4)
    keys, values = random_tokens(77)
    lengths = np.array([8, 5, 0, 1], np.int32)
    query = np.random.default_rng(3).normal(size=(B, 8, N, H)).astype(np.float32)
    after, out = verbs.prefill(state, query, keys, values, lengths)
    chex.assert_trees_all_equal(
        jax.device_get(after), jax.device_get(verbs.append(state, keys, values, lengths))
    )
    for row in range(B):
        before, end = verbs.held(state, row), int(state.end[row])
        for t in range(8):
            raw = (
                {end + i: np.stack([keys[row, i], values[row, i]]) for i in range(t + 1)}
                if t < lengths[row]
                else {}
            )
            still = {p: pair for p, pair in before.items() if p < 4 or p > end + t - 60}
            seen = np.array(list((still | raw).values())) if raw else np.zeros((0, 2, K, H))
            np.testing.assert_allclose(
                out[row, t], reference.exact_attention(query[row, t], seen), atol=2e-5
            )


def test_context_parallel_evict_and_rewind() -> None:
    """Both count whole positions; what any device refuses, all refuse."""
    state, verbs = dealt(Q4)
    ends = np.asarray(state.end)
    before = [list(verbs.held(state, row)) for row in range(B)]
    fewer = verbs.evict(state, np.array([5, 0, 1, 1000], np.int32))
    for row, count in enumerate([5, 0, 1, 0]):
        assert list(verbs.held(fewer, row)) == before[row][:4] + before[row][4 + count :]
    np.testing.assert_array_equal(
        np.asarray(fewer.cache.status).max(0) != 0, [False, False, False, True]
    )
    back = verbs.rewind(
        verbs.append(state, *random_tokens(5), np.full(B, 4, np.int32)),
        np.array([4, 4, 4, 2], np.int32),
    )
    np.testing.assert_array_equal(back.end - ends, [0, 0, 0, 2])
    for row in range(3):
        chex.assert_trees_all_equal(verbs.held(back, row), verbs.held(state, row))


def collectives(text: str) -> Iterator[tuple[str, int]]:
    """Kind and number of elements of every communication in a compiled program."""
    for line in text.splitlines():
        if found := re.search(
            r" = (.*?) (all-[a-z-]+|collective-[a-z-]+|reduce-scatter)(?:-start)?\(", line
        ):
            sizes = re.findall(r"\[([\d,]*)\]", found[1])
            yield (
                found[2],
                sum(math.prod(map(int, filter(None, size.split(",")))) for size in sizes),
            )


@pytest.mark.parametrize("gathered", [softmax.GATHERED, 0])
def test_only_partial_results_travel(gathered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the compiled program: both devices' partial outputs at once; or, if large, a maximum and a
    sum. Nothing of the cache."""
    monkeypatch.setattr(softmax, "GATHERED", gathered)
    state, _ = dealt(Q4)
    verbs, query = Verbs(mesh_of(ALL), state), random_query(1)
    text = verbs.attend.lower(state, query).compile().as_text()
    found = list(collectives(text))
    rows = (B // 2) * (N // 2)  # of one device
    expected = [2 * rows * (H + 2)] if gathered else [rows, rows * (1 + H)]
    assert found == [("all-reduce", size) for size in expected]
    assert not list(
        collectives(verbs.append.lower(state, *random_tokens(0), LENGTHS[0]).compile().as_text())
    )


@pytest.mark.slow
def test_placed_states_are_not_gathered() -> None:
    """Under `jit`, XLA's own communication is of the size of new tokens, never of the cache."""
    config = jaxkv.preset("q4", tail_length=8, max_tokens=4096, num_kv_heads=K, head_dim=H)
    mesh = mesh_of(ROWS_AND_HEADS)
    state = sharding.place(jaxkv.init(config, B), mesh, ROWS_AND_HEADS)
    new, query = random_tokens(0, 1), random_query(1)
    step = jax.jit(lambda state, new, query: jaxkv.attend(jaxkv.append(state, *new), query))
    found = list(collectives(step.lower(state, new, query).compile().as_text()))
    assert all(size <= 4 * new[0].size for _, size in found), found


# What cannot be split.


@pytest.mark.parametrize(
    ("fields", "axes", "message"),
    [
        (
            {"num_kv_heads": 3},
            ROWS_AND_HEADS,
            "num_kv_heads=3: must be a multiple of the 4 devices of mesh axis 'heads'",
        ),
        (
            {"tail_length": 7},
            ALL,
            "tail_length=7: must be a multiple of the 2 devices of mesh axis 'context'",
        ),
        ({"key_quant": QuantSpec(4, K * H)}, ROWS_AND_HEADS, "cannot be split by heads"),
        ({}, Axes("rows"), "axis 'rows': the mesh has axes"),
    ],
    ids=["heads", "context", "group", "axis"],
)
def test_refusals(fields: dict[str, Any], axes: Axes, message: str) -> None:
    config = KvCacheConfig(**{**SIZES, **fields})
    with pytest.raises(ValueError, match=message):
        shards.init(config, B, mesh=mesh_of(ALL if axes is ALL else ROWS_AND_HEADS), axes=axes)


def test_states_are_not_split_by_context() -> None:
    with pytest.raises(ValueError, match=r"deal out positions with jaxkv\.shards\.init"):
        sharding.place(jaxkv.init(Q4, B), mesh_of(ALL), ALL)
    with pytest.raises(ValueError, match="batch_size=3: must be a multiple of the 2 devices"):
        sharding.place(jaxkv.init(Q4, 3), mesh_of(ALL), ROWS_AND_HEADS)
