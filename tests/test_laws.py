"""The laws of a cache that only grows, each over the table in `cases.py`: positions, counts, codes
that stay as they are."""

from __future__ import annotations

import itertools

import chex
import jax
import numpy as np
from cases import (
    CASES,
    LONG,
    Array,
    Case,
    random_query,
    random_tokens,
)
from laws import (
    append,
    assert_like_reference,
    assert_same,
    attend,
    extend,
    gather,
    held,
    over,
    run,
    start,
    stats,
    tier_of,
)

import jaxkv
from jaxkv import Precision

# 1, 2. Positions and counts.


@over(CASES | LONG)
def test_positions_are_contiguous(case: Case) -> None:
    """What is held is a range that ends at the newest token, plus the sinks: as much as fits,
    oldest first."""
    sinks = case.config.sink_tokens
    for end, (_, _, positions) in zip(run(case).ends, run(case).contents, strict=True):
        expected = [*range(min(sinks, end)), *range(max(sinks, end - case.config.room), end)]
        expected += [-1] * (case.config.max_tokens - len(expected))
        np.testing.assert_array_equal(positions, [expected] * case.batch_size)


@over(CASES | LONG)
def test_counts_follow_the_rules(case: Case) -> None:
    """The store is evicted before the tail, which holds `tail_length`, or in batches less than a
    batch more."""
    config = case.config
    for end, state in zip(run(case).ends, run(case).states, strict=True):
        now, chain = stats(state), max(0, min(end - config.sink_tokens, config.room))
        assert (now.total_tokens == min(end, config.sink_tokens) + chain).all()
        if config.chain[0].name != "hot" or len(config.chain) == 1:
            continue
        assert (now.tail_tokens >= min(config.tail_length, chain)).all()
        assert (now.tail_tokens < config.tail_length + config.step).all()
        boundary = end - config.sink_tokens - now.tail_tokens
        assert ((boundary % config.step == 0) | (now.tail_tokens == chain)).all()


@over(CASES | LONG, slow=CASES | LONG)
def test_contents_equal_the_reference(case: Case) -> None:
    """After the last step every token is in the tier, and reads back as, in the NumPy twin."""
    assert_like_reference(run(case).states[-1], run(case).twins[-1])


# 3. Quantized once.


@over(CASES)
def test_tokens_change_only_with_their_tier(case: Case) -> None:
    """A token reads back with the same bits as long as it stays in its tier."""
    before: dict[int, Array] = {}
    tiers_before: dict[int, str] = {}
    crossed = set()
    for state, contents in zip(run(case).states, run(case).contents, strict=True):
        now, tiers = held(contents, row=-1), tier_of(state, row=-1)
        for position in now.keys() & before.keys():
            if tiers[position] == tiers_before[position]:
                np.testing.assert_array_equal(now[position], before[position])
            else:
                crossed.add((tiers_before[position], tiers[position]))
        before, tiers_before = now, tiers
    assert len(crossed) >= len(case.config.chain) - 1  # every boundary has been crossed


@over({name: case for name, case in CASES.items() if case.config.chain[-1].group == 1})
def test_stored_words_do_not_change(case: Case) -> None:
    """The packed words of a token in the last tier stay as they are until its slot is due again."""
    last = case.config.chain[-1]
    for old, new in itertools.pairwise(run(case).states):
        number = {"hot": "tail_tokens", "warm": "warm_tokens", "cold": "store_tokens"}[last.name]
        stop = old.begin[0] + getattr(stats(old), number)[0]
        slots = (np.arange(new.begin[0], stop) - case.config.sink_tokens) % last.capacity
        for before, after in zip(old.tiers[-1].sides, new.tiers[-1].sides, strict=True):
            np.testing.assert_array_equal(before.data[0][:, slots], after.data[0][:, slots])


# 4, 5. However the tokens arrive.


@over(CASES)
def test_append_of_many_is_many_appends(case: Case, rng: np.random.Generator) -> None:
    """append of T tokens == T appends of one, bit for bit."""
    state, query = start(case), random_query(rng, case)
    for t in range(case.num_tokens):
        state = append(state, run(case).keys[:, t : t + 1], run(case).values[:, t : t + 1])
    assert_same(state, run(case).states[-1])
    chex.assert_trees_all_equal(attend(state, query), attend(run(case).states[-1], query))


@over(CASES)
def test_ragged_rows(case: Case, rng: np.random.Generator) -> None:
    """append of lengths[b] tokens == append of just these, whatever stands behind them."""
    tokens = random_tokens(rng, case, 60)
    state, done = start(case), np.zeros(3, int)
    for _ in range(12):
        new, lengths = [np.full_like(x[:, :5], np.nan) for x in tokens], rng.integers(0, 6, 3)
        for b, length in enumerate(lengths):
            for side, x in zip(new, tokens, strict=True):
                side[b, :length] = x[b, done[b] : done[b] + length]
        state, done = append(state, *new, lengths), done + lengths
    for b in range(3):
        alone = extend(start(case), *(np.repeat(x[b : b + 1, : done[b]], 3, 0) for x in tokens))
        chex.assert_trees_all_equal(held(gather(state), b), held(gather(alone), b))
        assert tier_of(state, b) == tier_of(alone, b)


@over(CASES)
def test_rows_do_not_see_each_other(case: Case) -> None:
    """A row stores and gives the same bits whatever the others hold: other tokens, other lengths,
    NaN."""
    first_row = [x[:1] for x in random_tokens(np.random.default_rng(0), case, 30)]
    query, results = random_query(np.random.default_rng(0), case), []
    for seed in (1, 2):
        rng, state = np.random.default_rng(seed), start(case)
        others = [x[1:] * (np.nan if seed == 2 else 1) for x in random_tokens(rng, case, 30)]
        keys, values = (np.concatenate(pair) for pair in zip(first_row, others, strict=True))
        for first in range(0, 30, 5):
            lengths = np.array([5, *rng.integers(0, 6, case.batch_size - 1)])
            state = append(state, keys[:, first : first + 5], values[:, first : first + 5], lengths)
        results.append([x[0] for x in (*gather(state), attend(state, query))])
    chex.assert_trees_all_equal(*results)


# What it takes.


@over(CASES)
def test_bytes_are_the_devices(case: Case) -> None:
    """nbytes is what the arrays take; tail_bytes + store_bytes is their share behind the tokens
    held."""
    state = run(case).states[-1]
    config, now = case.config, stats(run(case).states[-1])
    assert jaxkv.nbytes(state) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    elements = config.num_kv_heads * sum(config.side_dims)
    fp16 = np.asarray(now.total_tokens).sum() * 2.0 * elements
    np.testing.assert_allclose(
        now.compression_ratio, fp16 / (now.tail_bytes + now.store_bytes), rtol=1e-6
    )
    if config.tail_length and not config.tail_precision.is_quantized:
        element = {Precision.FP32: 4}.get(config.tail_precision, 2)
        tokens = np.asarray(now.tail_tokens + now.sink_tokens).sum()
        np.testing.assert_allclose(now.tail_bytes, tokens * elements * element, rtol=1e-6)
