"""Shards: padding anywhere, rows that are full, files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from test_sharding import (
    ALL,
    LENGTHS,
    Q4,
    ROWS_AND_HEADS,
    B,
    N,
    Verbs,
    append,
    dealt,
    jit,
    mesh_of,
    random_query,
    random_tokens,
)

import jaxkv
from jaxkv import Status, StorageError, ring, shards
from jaxkv.shards import Shards

pytestmark = pytest.mark.slow


def mapped(verb: Any, state: Shards, *ins: PartitionSpec, out: Any) -> Any:
    mesh = mesh_of(state.axes)
    return jit(jax.shard_map(verb, mesh=mesh, in_specs=(state.specs, *ins), out_specs=out))


def test_padding_never_enters(rng: np.random.Generator) -> None:
    """`extend` with `valid` is `prefill` of the valid tokens put together, bit for bit, with zeros
    for the padding; `append` alike."""
    state, verbs = dealt(Q4)
    new, query = random_tokens(3), np.random.default_rng(3).normal(size=(B, 8, N, 32))
    query, valid = query.astype(np.float32), rng.random((B, 8)) < 0.6
    order = np.argsort(~valid, axis=1, kind="stable")
    front = [np.take_along_axis(x, order[..., None, None], 1) for x in (query, *new)]
    for x in (query, *new):
        x[~valid] = np.nan
    wanted, out = verbs.prefill(state, *front, valid.sum(1).astype(np.int32))
    flags = PartitionSpec(ALL.batch)
    out_specs = (state.specs, ALL.tokens)
    extend = mapped(shards.extend, state, *[ALL.tokens] * 3, flags, out=out_specs)
    after, found = extend(state, query, *new, valid)
    chex.assert_trees_all_equal(jax.device_get(after), jax.device_get(wanted))
    apart = np.take_along_axis(np.asarray(out), np.argsort(order, 1)[..., None, None], 1)
    np.testing.assert_array_equal(found, apart)
    assert not np.asarray(found)[~valid].any()
    enter = mapped(
        lambda state, keys, values, valid: shards.append(state, keys, values, valid=valid),
        state, ALL.tokens, ALL.tokens, flags, out=state.specs,
    )  # fmt: skip
    chex.assert_trees_all_equal(jax.device_get(enter(state, *new, valid)), jax.device_get(wanted))


def test_full_rows_refuse() -> None:
    """With `overflow="refuse"` shards take and refuse what one device's cache does."""
    config = dataclasses.replace(Q4, overflow="refuse")
    state, alone = shards.init(config, B, mesh=mesh_of(ALL), axes=ALL), jaxkv.init(config, B)
    verbs = Verbs(mesh_of(ALL), state)
    for i, lengths in enumerate(LENGTHS):
        state = verbs.append(state, *random_tokens(i), lengths)
        alone = append(alone, *random_tokens(i), lengths)
        np.testing.assert_array_equal(state.end, alone.end)
        np.testing.assert_array_equal(state.cache.refused, [alone.refused] * 2)
    assert (alone.status == Status.FULL).any() and not (alone.status == Status.FULL).all()
    one = np.ones(B, np.int32)
    after, out = verbs.prefill(state, random_query(8), *random_tokens(0), one)
    took = after.end > state.end
    assert not np.asarray(out)[~took].any() and np.asarray(out)[took, 0].any()


def test_positions_end() -> None:
    """Past the last position of int32 a row refuses on all devices, the row beside it goes on."""
    state, verbs = dealt(Q4)
    ends = jnp.asarray(state.end).at[0].set(ring.MOST)
    local = jnp.stack([(ends - part + 1) // 2 for part in range(2)])
    cache = dataclasses.replace(state.cache, end=local)
    state = dataclasses.replace(state, cache=cache, end=ends)
    after = verbs.append(state, *random_tokens(0), LENGTHS[0])
    np.testing.assert_array_equal(after.end - ends, [0, 8, 8, 8])
    np.testing.assert_array_equal(after.cache.refused, [[Status.OUT_OF_POSITIONS, 0, 0, 0]] * 2)


def test_files_of_shards(tmp_path: Path) -> None:
    """What was saved goes on bit for bit; a mesh of other sizes, a damaged file and one of a single
    state are refused."""
    path, (state, verbs) = tmp_path / "shards", dealt(Q4)
    shards.save(path, state)
    loaded = shards.load(path, mesh=mesh_of(ALL))
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
    new = (*random_tokens(9), LENGTHS[1])
    chex.assert_trees_all_equal(*(jax.device_get(verbs.append(x, *new)) for x in (loaded, state)))
    with pytest.raises(ValueError, match="mesh axis 'heads' has 4 devices for heads"):
        shards.load(path, mesh=jax.make_mesh((1, 4, 2), ("batch", "heads", "context")))
    with pytest.raises(StorageError):
        jaxkv.load(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match="cut short"):
        shards.load(path, mesh=mesh_of(ALL))
    jaxkv.save(path, jaxkv.init(Q4, B))
    with pytest.raises(StorageError):
        shards.load(path, mesh=mesh_of(ALL))
    broken = dataclasses.replace(state, end=state.end + 2)
    with pytest.raises(ValueError, match="positions that no verb leaves"):
        shards.save(path, broken)


@pytest.mark.parametrize("preset", ["q4k", "q8"])
def test_files_of_empty_shards(preset: str, tmp_path: Path) -> None:
    """Layers, no context axis, and scales that all heads share."""
    config = jaxkv.preset(preset, tail_length=8, max_tokens=64, num_kv_heads=4, head_dim=32)
    state = shards.init(config, B, 2, mesh=mesh_of(ROWS_AND_HEADS), axes=ROWS_AND_HEADS)
    shards.save(tmp_path / "shards", state)
    loaded = shards.load(tmp_path / "shards", mesh=mesh_of(ROWS_AND_HEADS))
    chex.assert_trees_all_equal(loaded, state)
