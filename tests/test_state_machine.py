"""A state machine over all verbs that act on rows, inside jit, where nothing can be raised: with
requests that cannot be met and hostile numbers where nothing may look, against the NumPy twin.

As laws: outputs are the twin's, what is hidden has no influence, and the status says what was
refused, and nothing else.
"""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from cases import CASES, Array, random_query, random_tokens
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from laws import assert_within, exact_attention
from test_verbs import B, Pair, T, append, clear, evict, rewind, take_rows

import jaxkv
from jaxkv import Status, reference

HOSTILE = [0.0, 1e-38, 7e4, 1e30, np.nan, np.inf, -np.inf]
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
replace_rows, extend = jit(jaxkv.replace_rows), jit(jaxkv.extend)
LOUD = [None, 0.0, 1e-38, -7e4]
NAMES = ["fp32", "rewind_fp32_q8_q2_sinks"]


def numbers(least: int, most: int) -> st.SearchStrategy[Any]:
    """One for each row."""
    return st.tuples(*[st.integers(least, most)] * B).map(lambda x: np.array(x, np.int32))


class Machine(RuleBasedStateMachine):
    """A state and its twin; `status` is what the state's must be."""

    name = "fp32"

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        config = CASES[self.name].config
        state, twin = jaxkv.init(config, B), reference.init(config, B)
        self.pair = Pair(CASES[self.name], state, twin, np.zeros(B, bool), np.ones(B, np.int32))
        self.rng, self.status = np.random.default_rng(seed), np.zeros(B, np.int32)

    def refuse(self, where: Array, bit: Status) -> None:
        self.status[where] |= int(bit)
        self.pair.refused = self.status != 0

    @rule(lengths=numbers(-1, T + 1), hidden=st.sampled_from(HOSTILE), loud=st.sampled_from(LOUD))
    def append(self, lengths: Array, hidden: float, loud: float | None) -> None:
        """Tokens beyond a row's length are padding, whatever they hold; lengths that are none are
        refused. One element of what enters may be of any size."""
        strange = (lengths < 0) | (lengths > T)
        taken = np.where(strange, 0, lengths)
        keys, values = (x[:B].copy() for x in random_tokens(self.rng, self.pair.case, T))
        if loud is not None:
            keys[0, 0, 0, 0] = values[1, 0, 0, 1] = loud
        self.pair.twin = reference.append(self.pair.twin, keys, values, taken)
        for x in (keys, values):
            x[np.arange(T) >= taken[:, None]] = hidden
        self.pair.state = append(self.pair.state, keys, values, lengths)
        self.refuse(strange, Status.OUT_OF_RANGE)
        self.pair.last = taken

    @rule(lengths=numbers(0, T), hidden=st.sampled_from(HOSTILE), left=st.booleans())
    def extend(self, lengths: Array, hidden: float, left: bool) -> None:
        """A part of a prompt attends, exactly on its own tokens, and enters; padding on the left or
        the right, queries included, may hold whatever it likes."""
        keys, values = (x[:B].copy() for x in random_tokens(self.rng, self.pair.case, T))
        query, state = random_query(self.rng, self.pair.case, T)[:B], self.pair.state
        new, ends = np.stack([keys, values], 2), np.asarray(state.end)
        raw = [{int(ends[b]) + t: new[b, t] for t in range(lengths[b])} for b in range(B)]
        expected, bound = exact_attention(state, query, lengths, raw)
        self.pair.twin = reference.append(self.pair.twin, keys, values, lengths)
        valid = np.arange(T) < lengths[:, None]
        for x in (query, keys, values):
            x[~valid] = hidden
        order = np.argsort(valid if left else ~valid, axis=1, kind="stable")
        given = [np.take_along_axis(x, order[..., None, None], 1) for x in (query, keys, values)]
        there = np.take_along_axis(valid, order, 1)
        self.pair.state, out = extend(state, *given, there)
        found = np.zeros_like(expected)
        found[valid] = np.asarray(out)[there]
        assert_within(np.abs(found - expected), bound)
        assert not np.asarray(out)[~there].any()
        self.pair.last = lengths

    @rule(count=numbers(0, 9), verb=st.sampled_from(["evict", "rewind"]))
    def drop_outside_jit(self, count: Array, verb: str) -> None:
        """What the twin refuses in any row raises, and changes nothing."""
        try:
            twin = getattr(reference, verb)(self.pair.twin, count)
        except ValueError:
            with pytest.raises(ValueError, match=r"count=|group"):
                getattr(jaxkv, verb)(self.pair.state, count)
            return
        self.pair.state, self.pair.twin = getattr(jaxkv, verb)(self.pair.state, count), twin
        self.pair.last = np.ones(B, np.int32)

    @rule()
    def saved(self) -> None:
        """To a file and back: the same bits but in slots never written, and the status."""
        with tempfile.TemporaryDirectory() as folder:
            jaxkv.save(f"{folder}/cache", self.pair.state)
            self.pair.state = jaxkv.load(f"{folder}/cache", config=self.pair.state.config)

    @rule(row=st.integers(0, B - 1))
    def concatenated(self, row: int) -> None:
        """Two batches are one, of which any rows can be taken."""
        two = jaxkv.concatenate([self.pair.state, clear(self.pair.state)])
        self.pair.state = take_rows(two, np.where(np.arange(B) == row, B + row, np.arange(B)))
        gone = np.arange(B) == row
        self.status[gone] = 0
        self.forget(gone)
        self.refuse(~gone, Status.OK)

    @rule(count=numbers(-1, 9), verb=st.sampled_from(["evict", "rewind"]))
    def drop(self, count: Array, verb: str) -> None:
        """What the twin refuses is refused, with the bit that says why."""
        ours, theirs, many = {
            "evict": (evict, reference.evict, Status.EVICT_TOO_MANY),
            "rewind": (rewind, reference.rewind, Status.REWIND_TOO_MANY),
        }[verb]
        self.pair.state, allowed = ours(self.pair.state, count), count.copy()
        for row in range(B):
            try:
                theirs(reference.take_rows(self.pair.twin, [row]), count[row])
            except ValueError as error:
                allowed[row], cuts = 0, "group" in str(error)
                bit = Status.OUT_OF_RANGE if count[row] < 0 else many
                self.refuse(np.arange(B) == row, Status.REWIND_CUTS_GROUP if cuts else bit)
        self.pair.twin, self.pair.last = theirs(self.pair.twin, allowed), np.ones(B, np.int32)

    @rule(rows=numbers(-2, B + 1))
    def take(self, rows: Array) -> None:
        """Rows that do not exist are taken empty."""
        there = (rows >= 0) & (rows < B)
        self.pair.state = take_rows(self.pair.state, rows)
        found = np.clip(rows, 0, B - 1)
        self.pair.twin = reference.take_rows(self.pair.twin, list(found))
        self.status = np.where(there, self.status[found], 0)
        self.pair.last = np.where(there, self.pair.last[found], 1).astype(np.int32)
        self.forget(~there)
        self.refuse(~there, Status.OUT_OF_RANGE)

    @rule(which=numbers(0, 1))
    def clear(self, which: Array) -> None:
        self.pair.state = clear(self.pair.state, which.astype(bool))
        self.status[which == 1] = 0
        self.refuse(np.zeros(B, bool), Status.OK)
        self.forget(which == 1)

    def forget(self, where: Array) -> None:
        """Rows of the twin, emptied."""
        fresh = reference.init(self.pair.twin.config, B).rows
        held = zip(fresh, self.pair.twin.rows, where, strict=True)
        rows = tuple(new if gone else old for new, old, gone in held)
        self.pair.twin = reference.ReferenceState(self.pair.twin.config, rows)
        self.pair.last = np.where(where, 1, self.pair.last).astype(np.int32)

    @rule(row=st.integers(-1, B))
    def fork(self, row: int) -> None:
        """Row 0 takes the place of another; of one that does not exist, nothing happens."""
        self.pair.state = replace_rows(
            self.pair.state, row, take_rows(self.pair.state, np.zeros(1, np.int32))
        )
        if 0 <= row < B:
            order = np.arange(B)
            order[row] = 0
            self.pair.twin = reference.take_rows(self.pair.twin, list(order))
            self.status, self.pair.last = self.status[order], self.pair.last[order]
            self.refuse(np.zeros(B, bool), Status.OK)

    @rule(way=st.sampled_from([copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]))
    def copied(self, way: Any) -> None:
        self.pair.state = way(self.pair.state)

    @invariant()
    def status_says_what_was_refused(self) -> None:
        if hasattr(self, "pair"):
            np.testing.assert_array_equal(self.pair.state.status, self.status)

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.check(self.rng)


@pytest.mark.parametrize(
    ("name", "runs"), [(NAMES[0], 20), pytest.param(NAMES[1], 6, marks=pytest.mark.slow)]
)
def test_state_machine(name: str, runs: int) -> None:
    """Runs of up to 12 steps."""
    machine = type("Machine", (Machine,), {"name": name})
    settings = hypothesis.settings(max_examples=runs, stateful_step_count=12)
    run_state_machine_as_test(machine, settings=settings)
