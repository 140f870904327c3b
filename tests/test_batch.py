"""Rows in and out of a running batch: forks, beams, joined batches, and requests that replace each
other, all without retracing."""

from __future__ import annotations

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Array, Case, random_query, random_tokens

import jaxkv
from jaxkv import CacheState, batch, storage

CONFIGS = {name: CASES[name] for name in ("fp16_q4", "channel_keys", "bf16_q8_q4_batched_sinks")}
over = pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[pytest.mark.slow] * (n != "fp16_q4"), id=n)
        for n, c in CONFIGS.items()
    ],
)

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
append, attend, gather = jit(jaxkv.append), jit(jaxkv.attend), jit(jaxkv.gather)
take_rows, replace_rows = jit(jaxkv.take_rows), jit(batch.replace_rows)


def grown(case: Case, keys: Array, values: Array, counts: list[int]) -> CacheState:
    """A state of rows that hold the first counts[b] of tokens [B, T, K, H], given five at a
    time."""
    state = jaxkv.init(case.config, len(keys))
    for first in range(0, keys.shape[1], 5):
        new = keys[:, first : first + 5], values[:, first : first + 5]
        state = append(state, *new, np.clip(np.array(counts) - first, 0, 5).astype(np.int32))
    return state


def row(state: CacheState, index: int) -> CacheState:
    """All that one row is, down to the bits of its codes."""
    return jax.tree.map(lambda leaf: leaf[index], state)


@pytest.mark.slow
@over
def test_forks_go_their_own_ways(case: Case, rng: np.random.Generator) -> None:
    """A prompt prefilled once serves several continuations, each as if it had been prefilled
    alone."""
    keys, values = (x[:1] for x in random_tokens(rng, case, 20))
    forks = take_rows(grown(case, keys, values, [20]), np.zeros(3, np.int32))
    more = random_tokens(rng, case, 15)
    for first in range(0, 15, 5):
        forks = append(forks, *(x[:, first : first + 5] for x in more), np.full(3, 5, np.int32))
    for b in range(3):
        alone = grown(
            case,
            *(
                np.concatenate([old, new[b : b + 1]], 1)
                for old, new in zip((keys, values), more, strict=True)
            ),
            [35],
        )
        chex.assert_trees_all_equal(row(forks, b), row(alone, 0))


@over
def test_beam_search(case: Case, rng: np.random.Generator) -> None:
    """Beams reordered by their parents at every step hold what their histories say, in one
    trace."""
    traces = []

    @jit
    def step(
        state: CacheState, parents: jax.Array, keys: jax.Array, values: jax.Array
    ) -> CacheState:
        traces.append(parents)
        return jaxkv.append(jaxkv.take_rows(state, parents), keys, values)

    state, histories = (
        jaxkv.init(case.config, 3),
        [np.zeros((2, 0, case.config.num_kv_heads, case.config.head_dim), np.float32)] * 3,
    )
    for _ in range(30):
        parents, new = rng.integers(0, 3, 3), random_tokens(rng, case, 1)
        state = step(state, parents.astype(np.int32), *new)
        histories = [
            np.concatenate([histories[p], np.stack([x[b] for x in new])], 1)
            for b, p in enumerate(parents)
        ]
    expected = grown(case, *np.stack(histories, axis=1), [30] * 3)
    chex.assert_trees_all_equal(gather(state), gather(expected))
    assert len(traces) == 1


@pytest.mark.slow
@over
def test_concatenated_batches(case: Case, rng: np.random.Generator) -> None:
    """Rows of several batches go on in one, bit for bit."""
    keys, values = random_tokens(rng, case, 30)
    apart = [
        grown(case, keys[part], values[part], counts)
        for part, counts in ((slice(1), [30]), (slice(1, 3), [7, 0]))
    ]
    together = batch.concatenate(apart)
    expected = grown(case, keys, values, [30, 7, 0])
    chex.assert_trees_all_equal(together, expected)
    new = random_tokens(rng, case, 5)
    lengths = np.array([5, 2, 4], np.int32)
    chex.assert_trees_all_equal(append(together, *new, lengths), append(expected, *new, lengths))


def test_concatenated_stacks(rng: np.random.Generator) -> None:
    """States with layers join along their rows, not along their layers."""
    config = CONFIGS["fp16_q4"].config
    joined = batch.concatenate(
        [jaxkv.init(config, 2, num_layers=3), jaxkv.init(config, 1, num_layers=3)]
    )
    chex.assert_trees_all_equal(joined, jaxkv.init(config, 3, num_layers=3))


@pytest.mark.slow
@over
def test_continuous_batching(case: Case, tmp_path: Path, rng: np.random.Generator) -> None:
    """Six requests of different lengths through three rows: each ends as if it had been alone,
    fresh or loaded, in one trace."""
    traces = []

    @jit
    def serve(
        state: CacheState, keys: jax.Array, values: jax.Array, query: jax.Array, lengths: jax.Array
    ) -> tuple[CacheState, jax.Array]:
        traces.append("serve")
        state = jaxkv.append(state, keys, values, lengths)
        return state, jaxkv.attend(state, query, lengths=lengths)

    @jit
    def admit(state: CacheState, slot: jax.Array, new: CacheState) -> CacheState:
        traces.append("admit")
        return batch.replace_rows(state, slot, new)

    prompt = grown(case, *(x[:1] for x in random_tokens(rng, case, 10)), [10])
    storage.save(tmp_path / "prompt", prompt)
    lengths = [12, 31, 7, 20, 9, 26]
    starts = [
        jaxkv.init(case.config, 1) if i % 2 else storage.load(tmp_path / "prompt") for i in range(6)
    ]
    alone, waiting, left, running = list(starts), list(range(6)), [0] * 3, [0] * 3
    state, nothing = jaxkv.init(case.config, 3), 0
    while waiting or any(left):
        for slot in range(3):
            if not left[slot] and waiting:
                running[slot] = waiting.pop(0)
                left[slot] = lengths[running[slot]]
                state = admit(state, np.int32(slot), starts[running[slot]])
        keys, values = random_tokens(rng, case, 1)
        query, active = random_query(rng, case, 1), np.array([int(n > 0) for n in left], np.int32)
        state, out = serve(state, keys, values, query, active)
        for slot in range(3):
            if not left[slot]:
                nothing += not np.asarray(out[slot]).any()
                continue
            left[slot] -= 1
            request = running[slot]
            alone[request] = append(alone[request], keys[slot : slot + 1], values[slot : slot + 1])
            if not left[slot]:
                chex.assert_trees_all_equal(row(state, slot), row(alone[request], 0))
                one = attend(alone[request], query[slot : slot + 1])
                np.testing.assert_allclose(out[slot], one[0], atol=1e-5)
    assert traces.count("serve") == traces.count("admit") == 1
    assert nothing > 0  # idle rows gave zeros


@pytest.mark.slow
@over
def test_only_the_row_is_replaced(case: Case, rng: np.random.Generator) -> None:
    keys, values = random_tokens(rng, case, 30)
    state, new = grown(case, keys, values, [30, 12, 25]), grown(case, keys[:2], values[:2], [18, 4])
    after = replace_rows(state, np.array([2, 0], np.int32), new)
    for b, (source, index) in enumerate([(new, 1), (state, 1), (new, 0)]):
        chex.assert_trees_all_equal(
            *(jax.tree.map(lambda leaf, i=i: leaf[i], s) for s, i in ((after, b), (source, index)))
        )


def test_rows_of_a_stack_are_replaced_in_all_layers(rng: np.random.Generator) -> None:
    def noise(state: CacheState) -> CacheState:
        return jax.tree.map(
            lambda leaf: jnp.asarray(rng.integers(0, 100, leaf.shape), leaf.dtype), state
        )

    config = CONFIGS["fp16_q4"].config
    state, new = (
        noise(jaxkv.init(config, 3, num_layers=2)),
        noise(jaxkv.init(config, 1, num_layers=2)),
    )
    after = replace_rows(state, np.int32(1), new)
    expected = jax.tree.map(
        lambda old, one: jnp.concatenate([old[:, :1], one, old[:, 2:]], axis=1), state, new
    )
    chex.assert_trees_all_equal(after, expected)


def test_rows_that_do_not_exist_are_left_out_inside_jit(rng: np.random.Generator) -> None:
    case = CONFIGS["fp16_q4"]
    state, new = grown(case, *random_tokens(rng, case, 5), [5] * 3), jaxkv.init(case.config, 2)
    after = replace_rows(state, np.array([-1, 3], np.int32), new)
    chex.assert_trees_all_equal(after, state)


def test_bad_input() -> None:
    case = CONFIGS["fp16_q4"]
    state, one = jaxkv.init(case.config, 3), jaxkv.init(case.config, 1)
    for rows, message in (
        (3, r"rows=\[3\]: the state has rows 0 .. 2"),
        ([0, 1], "one for each of the 1 new rows"),
        (1.0, "must be ints"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.replace_rows(state, rows, one)
    with pytest.raises(ValueError, match="each row can be replaced once"):
        batch.replace_rows(state, [1, 1], jaxkv.init(case.config, 2))
    other = jaxkv.init(CONFIGS["channel_keys"].config, 1)
    with pytest.raises(ValueError, match="different configs"):
        batch.replace_rows(state, 0, other)
    with pytest.raises(ValueError, match="different configs"):
        batch.concatenate([state, other])
    with pytest.raises(ValueError, match="num_layers=2, states"):
        batch.concatenate([state, jaxkv.init(case.config, 1, num_layers=2)])
    with pytest.raises(ValueError, match="no states"):
        batch.concatenate([])
