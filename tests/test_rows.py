"""On CPUs the rows of a large batch are attended one after the other: the results are the same, and
nothing is copied for it.

Batches are made large here by blocks that hold next to nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import test_hlo
import test_scoring
from cases import CASES, Case, random_query, random_tokens
from jax.sharding import AxisType
from laws import assert_within, exact_attention, extend, over, start

import jaxkv
from jaxkv import platform, shards
from jaxkv.chain import LANES
from jaxkv.kernels import xla
from jaxkv.sharding import Axes
from jaxkv.state import segments

pytestmark = pytest.mark.slow

SOME = {
    name: CASES[name] for name in ("bf16_q4_all_heads", "channel_keys", "bf16_q8_q4_batched_sinks")
}

BY_HEADS, DEALT = Axes(heads="core"), Axes(context="core")


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "TILE_BYTES", 1)
    monkeypatch.setattr(platform, "visits_rows", lambda: True)


def attend(*arguments: Any, **options: Any) -> Any:
    """Traced anew, so that no program from before the patch is taken."""
    return jax.jit(lambda *args: jaxkv.attend(*args, **options))(*arguments)


@pytest.mark.usefixtures("apart")
@over(SOME)
def test_rows_apart_are_attended_exactly(case: Case, rng: np.random.Generator) -> None:
    keys, values = random_tokens(rng, case, 60)
    state, lengths = (
        extend(start(case), keys, values),
        np.arange(case.batch_size, dtype=np.int32) % 4,
    )
    state = jaxkv.append(state, keys[:, :3], values[:, :3], lengths)
    query = random_query(rng, case, 3)
    expected, bound = exact_attention(state, query, lengths)
    assert_within(np.abs(np.asarray(attend(state, query, lengths=lengths)) - expected), bound)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("option", ["cross", "all"])
def test_rows_apart_have_their_own_options(option: str) -> None:
    """Tables of biases and masks by row, windows, decay, caps and sink logits."""
    test_scoring.check("chain", test_scoring.options(option))


@pytest.mark.parametrize("shape", ["one_state", "scanned_stack"])
def test_rows_apart_copy_nothing(shape: str, request: pytest.FixtureRequest) -> None:
    settings = test_hlo.config("three_tiers", test_hlo.SLOTS[0])
    step, arguments = test_hlo.SHAPES[shape](settings, 2)

    def text() -> str:
        return (
            jax.jit(lambda *args: step(*args), donate_argnums=0)
            .lower(*arguments)
            .compile()
            .as_text()
        )

    together = text()
    request.getfixturevalue("apart")
    apart = text()
    assert not test_hlo.sized_like_the_cache(apart, settings)
    assert apart.count(" while(") > together.count(" while(")


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("heads", [1, 2])
def test_the_loop_over_rows_copies_nothing(heads: int) -> None:
    """One kv head is a case of its own: XLA copied its tier for every row."""
    config = dataclasses.replace(
        test_hlo.config("three_tiers", test_hlo.SLOTS[0]), num_kv_heads=heads
    )
    state, query = (
        jax.eval_shape(lambda: jaxkv.init(config, 3)),
        jax.ShapeDtypeStruct((3, 1, 4, 64), np.float32),
    )
    text = jax.jit(lambda *args: jaxkv.attend(*args)).lower(state, query).compile().as_text()
    assert not test_hlo.sized_like_the_cache(text, config)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "axes"),
    [(1, 2, BY_HEADS), (3, 2, BY_HEADS), (3, 4, BY_HEADS), (1, 1, DEALT), (3, 1, DEALT)],
)
def test_attention_of_shards_copies_nothing(
    batch: int, heads: int, axes: Axes, by_row: bool, request: pytest.FixtureRequest
) -> None:
    """One head, or one group of a head, to a device: XLA copied the codes, or the scales, to
    flatten them."""
    if by_row:
        request.getfixturevalue("apart")
    slots = test_hlo.SLOTS[1] * (1 if axes.context is None else 2)
    config = dataclasses.replace(test_hlo.config("eager", slots), num_kv_heads=heads)
    mesh = jax.make_mesh((2,), ("core",), axis_types=(AxisType.Auto,))
    state, query = (
        shards.init(config, batch, mesh=mesh, axes=axes),
        jax.ShapeDtypeStruct((batch, 1, 4, 64), np.float32),
    )
    attend = jax.shard_map(
        lambda *args: shards.attend(*args),
        mesh=mesh,
        in_specs=(state.specs, axes.tokens),
        out_specs=axes.tokens,
    )
    assert not test_hlo.sized_like_the_cache(
        jax.jit(attend).lower(state, query).compile().as_text(), state.cache.config
    )


@pytest.mark.parametrize("capacity", [65, 1872, 4001, 16128])
def test_no_slot_is_looked_at_twice(capacity: int) -> None:
    """All blocks of a tier are alike, so that they cover it with next to nothing left over."""
    part = segments(
        jaxkv.init(dataclasses.replace(test_hlo.config("eager", capacity), num_kv_heads=4), 1)
    )[-1]
    assert capacity <= part.spec.capacity < capacity + LANES
    capacity = part.spec.capacity  # a long ring is whole windows
    size = xla._block_size(part, jax.ShapeDtypeStruct((1, 4, 2, 64), np.float32))
    blocks = -(-capacity // size)
    assert capacity <= blocks * size < capacity + 32 * blocks
