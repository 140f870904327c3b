"""Pages of a pool: who has which, and that none is lost, shared by mistake or written where it is
shared."""

from __future__ import annotations

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from jaxkv.tiers import allocation
from jaxkv.tiers.pages import Pages

ROWS, PAGES, SIZE, OFFSET, MOST = 3, 9, 4, 2, 14
ROW, COUNT = st.integers(0, ROWS - 1), st.integers(0, MOST)

take = jax.jit(allocation.take)
trim = jax.jit(allocation.trim)
share = jax.jit(allocation.share)
put = jax.jit(allocation.put)
retain = jax.jit(allocation.retain)
drop = jax.jit(allocation.drop)


def at_row(row: int, value: int, other: int = 0) -> np.ndarray:
    return np.where(np.arange(ROWS) == row, value, other).astype(np.int32)


class Rows(RuleBasedStateMachine):
    """Rows that write, part with and share positions of a pool, beside a model in which each has a
    dictionary of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = allocation.empty(PAGES, ROWS, MOST, SIZE, OFFSET)
        self.data = np.zeros((PAGES, SIZE), int)  # what the pages hold
        self.held: list[dict[int, int]] = [{} for _ in range(ROWS)]  # the same, by position
        self.end = np.full(ROWS, OFFSET, np.int32)
        self.outside: list[int] = []  # pages that an index refers to, with what they held
        self.frozen: list[np.ndarray] = []
        self.stamp = 0

    @rule(counts=st.tuples(*[COUNT] * ROWS))
    def append(self, counts: tuple[int, ...]) -> None:
        """Rows whose pages suffice write; the others stay as they were."""
        high = self.end + np.array(counts, np.int32)
        low = np.maximum(self.end, high - MOST)
        before = self.pages
        self.pages, granted, source, target = take(before, low, high)
        for old, new in zip(np.asarray(source), np.asarray(target), strict=True):
            if old >= 0:
                self.data[new] = self.data[old]
        assert np.array_equal(self.pages.ready(low, high, MOST) & granted, granted)
        for row in range(ROWS):
            if granted[row]:
                self.write(row, int(low[row]), int(high[row]))
            else:
                np.testing.assert_array_equal(self.pages.table[row], before.table[row])
        needs = [self.need(before, row, low[row], high[row]) for row in range(ROWS)]
        refused = [n for n, ok in zip(needs, np.asarray(granted), strict=True) if not ok]
        assert min(refused, default=PAGES + 1) > before.available - sum(
            n for n, ok in zip(needs, np.asarray(granted), strict=True) if ok
        )

    def need(self, pages: Pages, row: int, low: int, high: int) -> int:
        """How many pages a row lacks for [low, high)."""
        numbers = range((low - OFFSET) // SIZE, (high - 1 - OFFSET) // SIZE + 1)
        columns = [number % pages.table.shape[1] for number in numbers if low < high]
        ids = np.asarray(pages.table)[row, columns]
        return sum(page < 0 or pages.refs[page] > 1 for page in ids)

    def write(self, row: int, low: int, high: int) -> None:
        for position in range(low, high):
            self.stamp += 1
            page, slot = self.place(row, position)
            self.data[page, slot] = self.held[row][position] = self.stamp
        self.end[row] = high
        self.forget(row, high - MOST, high)

    def place(self, row: int, position: int) -> tuple[int, int]:
        slots = jnp.full((ROWS, 1), self.pages.slot_of(jnp.int32(position)))
        page, slot = (int(x[row, 0]) for x in self.pages.locate(slots))
        return page, slot

    def forget(self, row: int, low: int, high: int) -> None:
        self.held[row] = {p: x for p, x in self.held[row].items() if low <= p < high}

    @rule(row=ROW, oldest=COUNT, newest=COUNT)
    def trim(self, row: int, oldest: int, newest: int) -> None:
        """The oldest and the newest tokens go, as in an eviction and a rewind."""
        high = max(int(self.end[row]) - newest, OFFSET)
        low = min(high, min(self.held[row], default=OFFSET) + oldest)
        self.pages = trim(self.pages, at_row(row, low), at_row(row, high, 10**6))
        self.end[row] = high
        self.forget(row, low, high)

    @rule(source=ROW, to=ROW)
    def fork(self, source: int, to: int) -> None:
        self.pages = share(
            self.pages, np.array([source], np.int32), np.array([to], np.int32), self.end
        )
        self.held[to], self.end[to] = dict(self.held[source]), self.end[source]

    @rule(sources=st.tuples(*[ROW] * ROWS))
    def reorder(self, sources: tuple[int, ...]) -> None:
        """All rows at once, each the fork of another."""
        rows = np.arange(ROWS, dtype=np.int32)
        self.pages = share(self.pages, np.array(sources, np.int32), rows, self.end)
        self.held = [dict(self.held[row]) for row in sources]
        self.end = self.end[list(sources)]

    @rule(row=ROW)
    def release(self, row: int) -> None:
        none = np.full((1, self.pages.table.shape[1]), -1, np.int32)
        self.pages = put(self.pages, np.array([row], np.int32), none, none)
        self.held[row], self.end[row] = {}, OFFSET

    @rule(row=ROW)
    def retain(self, row: int) -> None:
        """An index refers to a row's oldest page, if that is full."""
        first = np.asarray(self.pages.first[row])
        full = [i for i in np.argsort(first) if first[i] >= 0 and first[i] + SIZE <= self.end[row]]
        if full:
            page = int(self.pages.table[row, full[0]])
            self.pages = retain(self.pages, np.array([page], np.int32))
            self.outside.append(page)
            self.frozen.append(self.data[page].copy())

    @rule()
    def drop(self) -> None:
        """It lets go of all of them at once, some named several times."""
        if self.outside:
            ids = np.full(PAGES, -1, np.int32)
            some = self.outside[:PAGES]
            ids[: len(some)] = some
            self.pages = drop(self.pages, ids)
            del self.outside[:PAGES], self.frozen[:PAGES]

    @invariant()
    def nothing_leaks(self) -> None:
        """References are those of the tables and the index; what is not free is used, once each."""
        table, first = np.asarray(self.pages.table), np.asarray(self.pages.first)
        refs = np.bincount([*table[table >= 0], *self.outside], minlength=PAGES)
        np.testing.assert_array_equal(self.pages.refs, refs)
        free = np.asarray(self.pages.free)[: int(self.pages.available)]
        np.testing.assert_array_equal(np.sort(free), np.flatnonzero(refs == 0))
        np.testing.assert_array_equal(table >= 0, first >= 0)
        for row in range(ROWS):
            mine = table[row][table[row] >= 0]
            assert len(set(mine)) == len(mine)

    @invariant()
    def every_token_is_there(self) -> None:
        """Each row reads what it, or the row that it was forked from, has written."""
        for row, held in enumerate(self.held):
            for position, stamp in held.items():
                assert self.data[self.place(row, position)] == stamp
        for page, data in zip(self.outside, self.frozen, strict=True):
            np.testing.assert_array_equal(self.data[page], data)


class TestRows(Rows.TestCase):  # type: ignore[misc]
    """Some sequences of steps."""

    pytestmark = pytest.mark.slow
    settings = hypothesis.settings(max_examples=12, stateful_step_count=30)


class TestManyRows(Rows.TestCase):  # type: ignore[misc]
    """Ten thousand steps."""

    pytestmark = pytest.mark.exhaustive
    settings = hypothesis.settings(max_examples=200, stateful_step_count=50)


def test_taking_compiles_once():
    """Rows come, grow and go in one program of each kind."""
    chex.clear_trace_counter()
    once = functools.partial(chex.assert_max_traces, n=1)
    grow, leave = jax.jit(once(allocation.take)), jax.jit(once(allocation.trim))
    pages, zeros = (
        allocation.empty(PAGES, ROWS, MOST, SIZE, OFFSET),
        np.full(ROWS, OFFSET, np.int32),
    )
    for step in range(2 * MOST):
        high = zeros + step % MOST
        pages, *_ = grow(pages, zeros, high)
        if step % 5 == 4:
            pages = leave(pages, zeros, zeros + step % 3)
