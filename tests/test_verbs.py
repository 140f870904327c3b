"""Any sequence of verbs leaves the cache as its NumPy twin has it: 2,000 random sequences.

Shapes are fixed and verbs compiled once per configuration; an example then takes some 30 ms, most
of it in the twin.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import laws
import numpy as np
import pytest
from cases import (
    CASES,
    Array,
    Case,
    accumulate,
    attention_bound,
    norms,
    random_query,
    random_tokens,
    tie_bound,
)

import jaxkv
from jaxkv import CacheState, reference, storage
from jaxkv.reference import ReferenceState

NAMES = [
    "fp32",
    "q4",
    "fp32_q4_batched_sinks",
    "channel_keys",
    "fp32_q8_q4",
    "rewind_bf16",
    "rewind_fp32_q8_q2_sinks",
    "rewind_channel",
]
EXAMPLES = [  # of each case, in all 200 in CI, and 2,000
    pytest.param(25, marks=pytest.mark.slow),
    pytest.param(250, marks=pytest.mark.exhaustive),
]
B, T = 2, 3
OPTIONS: dict[str, Any] = {"window": 7, "soft_cap": 6.0, "decay": 0.1}
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
append, evict, rewind = jit(jaxkv.append), jit(jaxkv.evict), jit(jaxkv.rewind)
take_rows, clear, migrate = jit(jaxkv.take_rows), jit(jaxkv.clear), jit(jaxkv.migrate)


@jit
def look(state: CacheState, query: Array, lengths: Array) -> Any:
    return (
        jaxkv.gather(state),
        jaxkv.stats(state),
        jaxkv.attend(state, query, lengths=lengths, return_lse=True, **OPTIONS),
    )


def counts(most: int) -> st.SearchStrategy[Any]:
    """A number for each row."""
    return st.tuples(*[st.integers(0, most)] * B).map(lambda numbers: np.array(numbers, np.int32))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), counts(T)),
        st.tuples(st.just("append"), st.just(np.full(B, T, np.int32))),
        st.tuples(st.just("rewind"), counts(4)),
        st.tuples(st.just("rewind"), counts(12)),
        st.tuples(st.just("evict"), counts(6)),
        st.tuples(st.just("take_rows"), counts(B - 1)),
        st.tuples(st.sampled_from(["clear", "migrate", "store"]), counts(0)),
    ),
    max_size=8,
)


@dataclasses.dataclass
class Pair:
    """A state and its twin, changed together; which rows have refused something; the rows' newest
    tokens given at once."""

    case: Case
    state: CacheState
    twin: ReferenceState
    refused: Array
    last: Array

    def append(self, lengths: Array, rng: np.random.Generator) -> None:
        keys, values = (x[:B] for x in random_tokens(rng, self.case, T))
        self.state, self.twin = (
            append(self.state, keys, values, lengths),
            reference.append(self.twin, keys, values, lengths),
        )
        self.last = lengths

    def drop(self, verb: str, numbers: Array) -> None:
        """evict or rewind; a row whose number the twin refuses is to stay as it was."""
        ours, theirs = {"evict": (evict, reference.evict), "rewind": (rewind, reference.rewind)}[
            verb
        ]
        self.state, allowed = ours(self.state, numbers), numbers.copy()
        for b in range(B):
            try:
                theirs(reference.take_rows(self.twin, [b]), numbers[b])
            except ValueError:
                self.refused[b], allowed[b] = True, 0
        self.twin, self.last = theirs(self.twin, allowed), np.ones(B, np.int32)

    def take_rows(self, rows: Array) -> None:
        self.state, self.twin = (
            take_rows(self.state, rows),
            reference.take_rows(self.twin, list(rows)),
        )
        self.refused, self.last = self.refused[rows], self.last[rows]

    def clear(self) -> None:
        self.state, self.twin = clear(self.state), reference.clear(self.twin)
        self.refused, self.last = np.zeros(B, bool), np.ones(B, np.int32)

    def check(self, rng: np.random.Generator) -> None:
        """The same positions in the same tiers, the same tokens but for rounding ties; attention
        with options is exact over them."""
        query = random_query(rng, self.case, T)[:B]
        found, tokens, (out, lse) = jax.tree.map(np.asarray, look(self.state, query, self.last))
        np.testing.assert_array_equal(self.state.status != 0, self.refused)
        np.testing.assert_array_equal(found[2], reference.gather(self.twin)[2])
        for theirs, ours in {
            "total": "total",
            "hot": "tail",
            "cold": "store",
            "sinks": "sink",
            "warm": "warm",
        }.items():
            np.testing.assert_array_equal(
                getattr(tokens, f"{ours}_tokens"), reference.counts(self.twin, theirs), ours
            )
        # Each query looks at the cache as it was when its own token was the newest.
        then = [laws.gather(laws.as_of(self.state, self.last - 1 - t)) for t in range(T)]
        for row in range(B):
            held = laws.held(found, row)
            expected, bounds = reference.held(self.twin, row), accumulate(self.twin, row, tie_bound)
            assert all((norms(pair - expected[p]) <= bounds[p]).all() for p, pair in held.items())
            seen = [laws.held(contents, row) for contents in then]
            self.check_attention(row, seen, query[row], out[row], lse[row])

    def check_attention(
        self, row: int, held: list[dict[int, Array]], query: Array, out: Array, lse: Array
    ) -> None:
        options, end, config = (
            reference.Options(**OPTIONS),
            self.twin.rows[row].end,
            self.case.config,
        )
        for t in range(T):
            at = end - int(self.last[row]) + t
            seen = [
                p
                for p in held[t]
                if t < self.last[row] and options.sees(row, t, at, p, config.sink_tokens)
            ]
            pairs, added = (
                np.array([held[t][p] for p in seen]),
                options.added(row, t, at, seen, len(query[t])),
            )
            expected, expected_lse = reference.attention_and_lse(
                query[t], pairs, None, added, options
            )
            # The cap and the decay are of the size of a few units: 1e-5 is for their rounding.
            assert np.abs(out[t] - expected).max() <= attention_bound(
                query[t], pairs
            ) + 1e-5 * np.abs(pairs).max(initial=0)
            np.testing.assert_allclose(lse[t], expected_lse, atol=1e-4)


@functools.cache
def begun(name: str, count: int) -> tuple[CacheState, ReferenceState]:
    """After `count` tokens."""
    case, rng = CASES[name], np.random.default_rng(count)
    state, twin = jaxkv.init(case.config, B), reference.init(case.config, B)
    for _ in range(count // T):
        new = [x[:B] for x in random_tokens(rng, case, T)]
        state, twin = append(state, *new, np.full(B, T, np.int32)), reference.append(twin, *new)
    return state, twin


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", NAMES)
def test_sequences_of_verbs(
    name: str, examples: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From an empty, a filling or an overflowing cache on."""
    path: Path = tmp_path_factory.mktemp("verbs") / "cache"

    @hypothesis.settings(
        max_examples=examples, phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink]
    )
    @hypothesis.given(start=st.sampled_from([0, 9, 30]), steps=STEPS, seed=st.integers(0, 2**16))
    def run(start: int, steps: list[tuple[str, Array]], seed: int) -> None:
        rng = np.random.default_rng(seed)
        pair = Pair(CASES[name], *begun(name, start), np.zeros(B, bool), np.ones(B, np.int32))
        for verb, numbers in steps:
            if verb == "append":
                pair.append(numbers, rng)
            elif verb in ("evict", "rewind"):
                pair.drop(verb, numbers)
            elif verb == "take_rows":
                pair.take_rows(numbers)
            elif verb == "clear":
                pair.clear()
            elif verb == "migrate":
                pair.state = migrate(pair.state)
            else:
                storage.save(path, pair.state)
                pair.state = storage.load(path)
        pair.check(rng)

    run()
