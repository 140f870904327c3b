"""The verbs other than append, one by one, against the NumPy twin."""

from __future__ import annotations

from typing import Any

import chex
import jax
import numpy as np
import pytest
from cases import (
    CASES,
    REWINDS,
    Array,
    Case,
    random_query,
    random_tokens,
)
from laws import (
    append,
    assert_attends,
    assert_like_reference,
    assert_same,
    clear,
    evict,
    extend,
    gather,
    held,
    over,
    poisoned,
    rewind,
    run,
    start,
    stats,
    take_rows,
    tier_of,
)

import jaxkv
from jaxkv import CacheState, Status, reference


@over(CASES)
def test_clear_is_as_new(case: Case) -> None:
    """After `clear` the same tokens give the same bits as in a new cache."""
    again = clear(run(case).states[-1])
    for first, size in zip(run(case).ends, case.steps[:6], strict=False):
        again = append(
            again,
            run(case).keys[:, first : first + size],
            run(case).values[:, first : first + size],
        )
    assert_same(again, run(case).states[len(case.steps[:6])])


@over(CASES)
def test_migrate_has_nothing_to_do(case: Case) -> None:
    """`append` leaves nothing due."""
    for state in run(case).states[-3:]:
        assert_same(jaxkv.migrate(state), state)


@over(CASES)
def test_evict_drops_the_oldest(case: Case, rng: np.random.Generator) -> None:
    """evict(n) drops the n oldest tokens after the sinks; the others keep their bits, and the cache
    goes on."""
    state, twin = run(case).states[-1], run(case).twins[-1]
    chain = stats(state).total_tokens - stats(state).sink_tokens
    for count in (np.zeros_like(chain), rng.integers(1, np.minimum(chain, 4) + 1), chain):
        fewer, before = evict(state, count.astype(np.int32)), held(gather(state), row=-1)
        kept = [p for p in before if p >= case.config.sink_tokens][int(count[-1]) :]
        wanted = {p: before[p] for p in (*range(min(case.config.sink_tokens, len(before))), *kept)}
        chex.assert_trees_all_equal(held(gather(fewer), row=-1), wanted)
        new = random_tokens(rng, case, 5)
        assert_like_reference(
            append(fewer, *new), reference.append(reference.evict(twin, count), *new)
        )
        assert_attends(fewer, random_query(rng, case))


@over(REWINDS)
def test_rewind_within_its_length_leaves_no_trace(case: Case, rng: np.random.Generator) -> None:
    """append, then rewind of as many (each row its own number up to `rewind_length`) == nothing,
    bit for bit."""
    keys, values = random_tokens(rng, case, 60)
    most = case.config.rewind_length
    for end in range(18, 18 + 2 * case.config.step + 1):
        plain = extend(start(case), keys[:, :end], values[:, :end])
        depth = rng.integers(1, most + 1, case.batch_size).astype(np.int32)
        drafted = plain
        for t in range(most):
            drafted = append(drafted, *(x[:, :1] for x in random_tokens(rng, case, 1)), t < depth)
        drafted = rewind(drafted, depth)
        for first in range(end, end + 10, 5):
            assert_same(drafted, plain)
            new = keys[:, first : first + 5], values[:, first : first + 5]
            drafted, plain = append(drafted, *new), append(plain, *new)
        assert_same(drafted, plain)
        assert not drafted.status.any()


@over(CASES)
def test_deep_rewind_keeps_what_is_held(case: Case, rng: np.random.Generator) -> None:
    """Beyond its length, rewind(n) drops the n newest and nothing else; evicted tokens stay away;
    the cache goes on."""
    for state, twin in (
        (run(case).states[3], run(case).twins[3]),
        (run(case).states[-1], run(case).twins[-1]),
    ):
        for depth in (5, 8, int(stats(state).total_tokens.min()) - case.config.sink_tokens):
            before, end = held(gather(state), row=0), int(state.end[0])
            rewound = rewind(state, np.full(case.batch_size, depth, np.int32))
            try:
                expected = reference.rewind(twin, depth)
            except ValueError:
                assert rewound.status.all()
                assert_same(rewound, state)
                continue
            after = held(gather(rewound), row=0)
            assert not rewound.status.any()
            assert max(after, default=-1) < end - depth
            assert after.keys() >= {p for p in before if p < end - depth}
            assert_like_reference(rewound, expected)
            new = random_tokens(rng, case, 5)
            assert_like_reference(append(rewound, *new), reference.append(expected, *new))


@over(CASES)
def test_take_rows(case: Case, rng: np.random.Generator) -> None:
    """Rows may be reordered, dropped and repeated; copies then go their own ways."""
    keys, values = random_tokens(rng, case, 5)
    state = append(run(case).states[-1], keys, values, np.arange(3) + 1)
    for order in ([2, 0, 1], [1, 1, 1], [2], [0, 2, 1, 0]):
        taken = take_rows(state, np.array(order))
        wanted = jax.tree.map(lambda x, rows=order: x[np.array(rows)], gather(state))
        # Another batch is another program, which may turn codes back with products and sums
        # contracted, or not: a few roundings. Of one row each, the programs are the same.
        chex.assert_trees_all_close(gather(taken), wanted, rtol=0, atol=largest(wanted) * 2.0**-22)
        for row, source in enumerate(order):
            pair = take_rows(taken, np.array([row])), take_rows(state, np.array([source]))
            chex.assert_trees_all_equal(*map(gather, pair))
    forked, one = take_rows(state, np.array([1, 1, 1])), append(state, keys, values)
    forked = append(forked, keys, values)
    assert_tier_and_bits(forked, one, row=1)
    assert not np.array_equal(forked_newest(forked, 0), forked_newest(forked, 2))


def largest(tree: Any) -> float:
    return float(max(np.abs(x).max() for x in jax.tree.leaves(tree) if x.dtype == np.float32))


def assert_tier_and_bits(actual: CacheState, expected: CacheState, row: int) -> None:
    chex.assert_trees_all_equal(held(gather(actual), row), held(gather(expected), row))
    assert tier_of(actual, row) == tier_of(expected, row)


def forked_newest(state: CacheState, row: int) -> Array:
    return list(held(gather(state), row).values())[-1]


@pytest.mark.slow
def test_evicted_neighbours_do_not_spoil_a_group() -> None:
    """Tokens evicted before their group was quantized are still there to be quantized with it, in
    every tier."""
    case = CASES["fp32_q8_channel"]
    keys, values = random_tokens(np.random.default_rng(0), case, 30)
    state = poisoned(start(case), np.nan, -1)
    twin = reference.init(case.config, case.batch_size)
    for first in range(0, 30, 5):
        new = keys[:, first : first + 5], values[:, first : first + 5]
        state, twin = append(state, *new), reference.append(twin, *new)
        if first == 5:
            state, twin = (
                evict(state, np.full(case.batch_size, 7, np.int32)),
                reference.evict(twin, 7),
            )
        assert_like_reference(state, twin)


@over({name: CASES[name] for name in ("channel_keys", "fp32_q8_channel", "rewind_channel")})
def test_lost_neighbours_do_not_spoil_a_group(case: Case, rng: np.random.Generator) -> None:
    """Where they are gone, overwritten by tokens that a rewind dropped since, nothing of these gets
    into their group."""
    keys, values = random_tokens(rng, case, 30)
    keys[:, 25:] *= 1e4
    state, twin = (
        extend(start(case), keys, values),
        reference.append(reference.init(case.config, case.batch_size), keys, values),
    )
    begin = int(state.begin[0])
    dropped = 6 - (begin - case.config.sink_tokens) % 4  # up to the third token of a group
    rest = 30 - begin - dropped
    state, twin = (
        verbs[1](
            verbs[0](x, np.full(case.batch_size, dropped, np.int32)),
            np.full(case.batch_size, rest, np.int32),
        )
        for verbs, x in (((evict, rewind), state), ((reference.evict, reference.rewind), twin))
    )
    assert not state.status.any()
    for _ in range(6):
        new = random_tokens(rng, case, 5)
        state, twin = append(state, *new), reference.append(twin, *new)
        assert_like_reference(state, twin)


@over({name: CASES[name] for name in ("q4", "fp16_q4", "fp32_q8_q4", "bf16_q8_q4_batched_sinks")})
def test_evicted_tokens_do_not_keep_a_store_from_aligning(
    case: Case, rng: np.random.Generator
) -> None:
    """An empty store is aligned by the first tokens that come to it, whatever was evicted before,
    and after `clear` anew."""
    state, twin = start(case), reference.init(case.config, case.batch_size)
    for dropped in (2, 0):
        for round_ in range(4):
            new = random_tokens(rng, case, 5)
            state, twin = append(state, *new), reference.append(twin, *new)
            if round_ == 0:
                count = np.full(case.batch_size, dropped, np.int32)
                state, twin = evict(state, count), reference.evict(twin, dropped)
        for side, half in enumerate((state.tiers[-1].keys, state.tiers[-1].values)):
            if half.mirror is not None:
                expected = np.stack([row.mirrors[-1][side] for row in twin.rows])
                assert expected.any((1, 2)).all()
                np.testing.assert_allclose(half.mirror, expected, atol=2.0**-10)
        state, twin = clear(state), reference.clear(twin)


# Refused inside compiled functions.


@pytest.mark.slow
def test_refused_rows_stay_as_they_were(rng: np.random.Generator) -> None:
    """A count that is too large leaves its row alone and sets a bit that stays until `clear`; other
    rows go on."""
    case = CASES["fp16_q4"]
    state = extend(start(case), *random_tokens(rng, case, 10))
    for verb, bit in ((evict, Status.EVICT_TOO_MANY), (rewind, Status.REWIND_TOO_MANY)):
        after = verb(state, np.array([11, 10, 2], np.int32))
        np.testing.assert_array_equal(after.status, [bit, 0, 0])
        np.testing.assert_array_equal(stats(after).total_tokens, [10, 0, 8])
        chex.assert_trees_all_equal(held(gather(after), 0), held(gather(state), 0))
        again = append(after, *random_tokens(rng, case, 1))
        np.testing.assert_array_equal(again.status, [bit, 0, 0])
        np.testing.assert_array_equal(take_rows(again, np.array([2, 0])).status, [0, bit])
        assert not clear(again).status.any()
