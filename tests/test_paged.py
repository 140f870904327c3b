"""A pool of pages holds what as many caches hold, bit for bit, whatever its rows do to each
other."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, FP16, Q4, Case, config, random_query
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from laws import append, assert_attends, attend, evict, gather, over, rewind, run, stats

import jaxkv
from jaxkv import CacheState, Status, paged
from jaxkv.batch import concatenate, replace_rows

pytestmark = pytest.mark.slow

reserve = jax.jit(paged.reserve)
fork = jax.jit(paged.fork)
release = jax.jit(paged.release)
window = jax.jit(paged.window)
snapshot = jax.jit(paged.snapshot)
retain = jax.jit(paged.retain)
drop = jax.jit(paged.drop)
adopt = jax.jit(paged.adopt)

COMPARED = {
    name: CASES[name]
    for name in (
        "q8",
        "channel_keys",
        "bf16_q8_q4_batched_sinks",
        "rewind_fp32_q8_q2_sinks",
    )
}


def pool_for(case: Case, num_pages: int = 40) -> CacheState:
    unit = max(case.config.step, case.config.chain[-1].group)
    return paged.init(case.config, num_pages, case.batch_size, -(-4 // unit) * unit)


def extend(pool: CacheState, keys: Any, values: Any, lengths: Any) -> CacheState:
    lengths = np.broadcast_to(lengths, len(keys)).astype(np.int32)
    pool, granted = reserve(pool, lengths)
    return append(pool, keys, values, np.where(granted, lengths, 0))


def same_tokens(pool: CacheState, plain: CacheState) -> None:
    chex.assert_trees_all_equal(gather(pool), gather(plain))
    chex.assert_trees_all_equal(stats(pool), stats(plain))


@over(COMPARED)
def test_rows_of_a_pool_are_those_of_a_cache(case, rng):
    """The same tokens in the same tiers, bit for bit, through prompts, wraps and evictions; and
    attention over them."""
    done, pool = run(case), pool_for(case)
    for index, size in enumerate(case.steps):
        new = slice(done.ends[index], done.ends[index + 1])
        pool = extend(pool, done.keys[:, new], done.values[:, new], size)
        if index % 5 == 0 or index == len(case.steps) - 1:
            same_tokens(pool, done.states[index + 1])
    query = random_query(rng, case)
    assert_attends(pool, query)
    np.testing.assert_array_equal(pool.status, 0)
    plain = done.states[-1]
    for verb, count in ((rewind, jnp.int32(3)), (evict, jnp.int32(2)), (rewind, jnp.int32(1))):
        pool, plain = verb(pool, count), verb(plain, count)
        same_tokens(pool, plain)


def test_a_row_without_pages_says_so():
    """An append that nothing was reserved for changes nothing and sets a bit."""
    case = SMALL
    pool = pool_for(case)
    keys, values = np.ones((2, 3, 5, 2, 16), np.float32)
    for _ in range(2):  # 7 tokens need no page: sinks and tail hold them
        pool = append(pool, keys, values, [5, 2, 5])
    np.testing.assert_array_equal(pool.end, [5, 4, 5])
    np.testing.assert_array_equal(pool.status, Status.OUT_OF_PAGES * np.array([1, 0, 1]))
    pool = extend(pool, keys, values, 5)
    np.testing.assert_array_equal(pool.end, [10, 9, 10])


def test_verbs_that_take_rows_apart_refuse_a_pool(tmp_path):
    pool = pool_for(SMALL)
    for call in (
        lambda: jaxkv.take_rows(pool, [0]),
        lambda: replace_rows(pool, 0, pool),
        lambda: concatenate([pool]),
        lambda: jaxkv.save(tmp_path / "pool", pool),
    ):
        with pytest.raises(ValueError, match="share their pages"):
            call()
    with pytest.raises(ValueError, match="no pages"):
        paged.reserve(jaxkv.init(SMALL.config), 1)
    with pytest.raises(ValueError, match="page_size=6: must be a multiple of 4"):
        paged.init(COMPARED["channel_keys"].config, 8, 1, 6)


SMALL = Case(
    "pool", config(5, FP16, Q4, 24, 2, 16, sink_tokens=2, rewind_length=3), 4, batch_size=3
)
ROW, COUNT = st.integers(0, 2), st.integers(0, 5)


class Sequences(RuleBasedStateMachine):
    """Rows of one pool beside caches of one row each."""

    @initialize()
    def start(self) -> None:
        self.rng = np.random.default_rng(0)
        self.pool = paged.init(SMALL.config, 11, 3, 4)
        self.rows = [jaxkv.init(SMALL.config) for _ in range(3)]
        self.kept: list[tuple[paged.Row, CacheState]] = []
        self.parked: list[tuple[paged.Parked, CacheState]] = []

    @rule(lengths=st.tuples(COUNT, COUNT, COUNT))
    def append(self, lengths: tuple[int, ...]) -> None:
        """Rows for which the pages suffice go on; the others stay as they were, and say so."""
        keys, values = self.rng.normal(size=(2, 3, 5, 2, 16)).astype(np.float32)
        self.pool, granted = reserve(self.pool, np.array(lengths, np.int32))
        self.pool = append(self.pool, keys, values, np.array(lengths))
        for row, (length, ok) in enumerate(zip(lengths, np.asarray(granted), strict=True)):
            flagged = int(self.pool.status[row]) & Status.OUT_OF_PAGES
            assert ok or flagged
            if ok:
                one = keys[row : row + 1], values[row : row + 1]
                self.rows[row] = append(self.rows[row], *one, length)

    @rule(row=ROW, count=COUNT, verb=st.sampled_from([rewind, evict]))
    def shorten(self, row: int, count: int, verb: Any) -> None:
        one = verb(self.rows[row], jnp.int32(count))
        counts = np.where(np.arange(3) == row, count, 0).astype(np.int32)
        self.pool = verb(self.pool, counts)
        self.rows[row] = one

    @rule(length=st.integers(0, 24))
    def window(self, length: int) -> None:
        self.pool = window(self.pool, jnp.int32(length))
        for row, plain in enumerate(self.rows):
            begin = int(self.pool.begin[row])
            assert begin <= max(int(plain.begin[0]), int(plain.end[0]) - length)
            self.rows[row] = evict(plain, jnp.int32(begin - int(plain.begin[0])))

    @rule(sources=st.tuples(ROW, ROW, ROW))
    def reorder(self, sources: tuple[int, ...]) -> None:
        self.pool = fork(self.pool, np.array(sources, np.int32), np.arange(3, dtype=np.int32))
        self.rows = [self.rows[row] for row in sources]

    @rule(row=ROW)
    def keep(self, row: int) -> None:
        """An index holds a row as it is now, whatever becomes of it."""
        held = snapshot(self.pool, jnp.int32(row))
        self.pool = retain(self.pool, held.table)
        self.kept.append((held, self.rows[row]))

    @rule(row=ROW)
    def go_on(self, row: int) -> None:
        """A row goes on from what the index holds."""
        if self.kept:
            held, self.rows[row] = self.kept[0]
            self.pool = adopt(self.pool, jnp.int32(row), held)

    @rule()
    def forget(self) -> None:
        if self.kept:
            self.pool = drop(self.pool, self.kept.pop(0)[0].table)

    @rule(row=ROW)
    def park(self, row: int) -> None:
        self.pool, parked = paged.offload(self.pool, row)
        self.parked.append((parked, self.rows[row]))
        self.rows[row] = jaxkv.init(SMALL.config)

    @rule(row=ROW)
    def restore(self, row: int) -> None:
        """A parked row comes back, if there are pages for it."""
        if self.parked:
            parked, plain = self.parked[0]
            self.pool, there = paged.restore(self.pool, row, parked)
            self.rows[row] = plain if there else jaxkv.init(SMALL.config)
            self.parked = self.parked[there:]

    @rule(row=ROW)
    def release(self, row: int) -> None:
        self.pool = release(self.pool, jnp.int32(row))
        self.rows[row] = jaxkv.init(SMALL.config)

    @invariant()
    def each_holds_its_own(self) -> None:
        """Free pages are poisoned: none of what they hold may be seen."""
        self.pool = poisoned(self.pool)
        held = gather(self.pool)
        for row, plain in enumerate(self.rows):
            one = jax.tree.map(lambda x, row=row: x[row : row + 1], held)
            chex.assert_trees_all_equal(one, gather(plain))

    @invariant()
    def nothing_leaks(self) -> None:
        """References are those of the tables and of what the index holds; the rest is free."""
        pages = self.pool.pages
        ids = np.concatenate([pages.table, *(held.table[None] for held, _ in self.kept)])
        refs = np.bincount(ids[ids >= 0], minlength=pages.num_pages)
        np.testing.assert_array_equal(pages.refs, refs)
        free = np.asarray(pages.free)[: int(pages.available)]
        np.testing.assert_array_equal(np.sort(free), np.flatnonzero(refs == 0))

    @invariant()
    def attention_is_that_of_the_caches(self) -> None:
        query = self.rng.normal(size=(3, 1, 4, 16)).astype(np.float32)
        out = attend(self.pool, query)
        for row, plain in enumerate(self.rows):
            expected = attend(plain, query[row : row + 1])
            np.testing.assert_allclose(out[row : row + 1], expected, atol=1e-4, rtol=1e-4)


def poisoned(pool: CacheState) -> CacheState:
    """The pool with NaN, or the largest codes, in its free pages and in the one that is nobody's."""
    free = np.append(np.flatnonzero(np.asarray(pool.pages.refs) == 0), pool.pages.num_pages)
    last = pool.tiers[-1]

    def spoil(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if path[-1].name in ("mirror", "mean"):
            return leaf
        bad = np.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.iinfo(leaf.dtype).max
        spoiled = np.array(leaf)
        spoiled[free] = bad
        return jnp.asarray(spoiled)

    last = jax.tree_util.tree_map_with_path(spoil, last)
    return dataclasses.replace(pool, tiers=(*pool.tiers[:-1], last))


TestSequences = Sequences.TestCase
TestSequences.settings = hypothesis.settings(max_examples=10, stateful_step_count=25)
