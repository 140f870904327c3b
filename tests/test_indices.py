"""No program writes outside an array: some backends do not drop such a write (MLX's scatter damages
whatever lies there)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

import jaxkv
from jaxkv import CacheState, KvCacheConfig, platform

pytestmark = pytest.mark.slow

HEADS, HEAD_DIM, PROMPT = 2, 64, 150


def audited(function: Callable[..., Any]) -> Callable[..., jax.Array]:
    """`function` that returns how many of its writes start outside their array, or end there."""

    def audit(*args: Any) -> jax.Array:
        closed = jax.make_jaxpr(function)(*args)
        return _run(closed.jaxpr, closed.consts, jax.tree.leaves(args))[1]

    return audit


def _run(
    jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]
) -> tuple[list[Any], jax.Array]:
    """The outputs of a program, and its count."""
    known, bad = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True)), _NONE
    for eqn in jaxpr.eqns:
        values = [v.val if isinstance(v, core.Literal) else known[v] for v in eqn.invars]
        found, more = _apply(eqn, values)
        known.update(zip(eqn.outvars, found, strict=True))
        bad = bad + more
    return [v.val if isinstance(v, core.Literal) else known[v] for v in jaxpr.outvars], bad


_NONE = np.int32(0)


def _apply(eqn: core.JaxprEqn, values: list[Any]) -> tuple[Any, Any]:
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        branches = [_closed(branch) for branch in params["branches"]]
        return lax.switch(values[0], branches, *values[1:])
    if name == "while":
        return _while(params, values)
    if name == "scan":
        return _scan(params, values)
    if name in ("jit", "pjit", "custom_jvp_call", "custom_vjp_call"):
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        return _run(inner.jaxpr, inner.consts, values)
    out = eqn.primitive.bind(*values, **params)
    return (out if eqn.primitive.multiple_results else [out]), _outside(name, params, values)


def _closed(inner: Any) -> Callable[..., Any]:
    return lambda *args: _counted(*_run(inner.jaxpr, inner.consts, args))


def _counted(outs: Any, bad: Any) -> tuple[list[Any], jax.Array]:
    return list(outs), jnp.int32(bad)


def _while(params: dict[str, Any], values: list[Any]) -> tuple[Any, Any]:
    test, body = params["cond_jaxpr"], _closed(params["body_jaxpr"])
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    for_test, for_body, start = values[:first], values[first:second], values[second:]

    def turn(carry: Any) -> Any:
        outs, bad = body(*for_body, *carry[0])
        return outs, carry[1] + bad

    return lax.while_loop(
        lambda carry: _run(test.jaxpr, test.consts, [*for_test, *carry[0]])[0][0],
        turn,
        (start, jnp.int32(0)),
    )


def _scan(params: dict[str, Any], values: list[Any]) -> tuple[Any, Any]:
    body, first = _closed(params["jaxpr"]), params["num_consts"]
    second = first + params["num_carry"]

    def turn(carry: Any, xs: Any) -> Any:
        outs, bad = body(*values[:first], *carry[0], *xs)
        return (outs[: params["num_carry"]], carry[1] + bad), outs[params["num_carry"] :]

    start = [jnp.asarray(x) for x in values[first:second]], jnp.int32(0)
    (outs, bad), ys = lax.scan(
        turn, start, values[second:], length=params["length"], reverse=params["reverse"]
    )
    return [*outs, *ys], bad


def _outside(name: str, params: dict[str, Any], values: list[Any]) -> Any:
    if name in ("dynamic_update_slice", "dynamic_slice"):
        array, starts = values[0], values[2:] if name == "dynamic_update_slice" else values[1:]
        sizes = jnp.shape(values[1]) if name == "dynamic_update_slice" else params["slice_sizes"]
        ends = zip(starts, sizes, array.shape, strict=True)
        return sum(jnp.int32((at < 0) | (at > n - size)) for at, size, n in ends)
    if not name.startswith("scatter") or params["mode"] == lax.GatherScatterMode.CLIP:
        return _NONE
    array, indices, updates = values
    dims = params["dimension_numbers"]
    still = (*dims.inserted_window_dims, *dims.operand_batching_dims)
    moving = [axis for axis in range(array.ndim) if axis not in still]
    window = dict(zip(moving, (updates.shape[i] for i in dims.update_window_dims), strict=True))
    most = [array.shape[i] - window.get(i, 1) for i in dims.scatter_dims_to_operand_dims]
    return ((indices < 0) | (indices > jnp.array(most))).any(-1).sum(dtype=jnp.int32)


# The count sees what it is for.


def test_writes_outside_are_seen() -> None:
    """Through loops, branches and nested programs; what is clipped is inside."""
    x, at = jnp.zeros((4, 8)), jnp.array([1, 7, -3])

    def set_in(x: jax.Array, at: jax.Array, **mode: Any) -> jax.Array:
        return x.at[:, at].set(1.0, wrap_negative_indices=False, **mode)

    def looped(x: jax.Array, at: jax.Array) -> jax.Array:
        def turn(x: jax.Array, at: jax.Array) -> tuple[jax.Array, None]:
            return lax.cond(at.sum() > 0, lambda x: x, lambda x: jax.jit(set_in)(x, at), x), None

        return lax.fori_loop(0, 3, lambda _, x: lax.scan(turn, x, at[:, None])[0], x)

    assert audited(set_in)(x, at) == 1
    assert audited(set_in)(x, at + 3) == 1
    assert audited(lambda x, at: set_in(x, at, mode="clip"))(x, at) == 0
    assert jax.jit(audited(looped))(x, at) == 3
    assert audited(lambda x: lax.dynamic_update_slice(x, jnp.ones((1, 8)), (4, 0)))(x) == 1


SMALL = {"num_kv_heads": HEADS, "head_dim": HEAD_DIM, "tail_length": 40}


def states(config: KvCacheConfig, rows: int, layers: int | None) -> list[CacheState]:
    """An empty cache, and one whose every ring is full and has been round."""
    empty = jaxkv.init(config, rows, layers)
    end = jnp.arange(rows, dtype=jnp.int32) + config.max_tokens * 3 + 7
    lost = jnp.stack([end - config.sink_tokens - tier.capacity for tier in config.chain], -1)
    end, lost = jnp.broadcast_to(end, empty.end.shape), jnp.broadcast_to(lost, empty.lost.shape)
    return [empty, dataclasses.replace(empty, end=end, lost=lost)]


COUNTS = (0, 1, PROMPT, 1, 1, -1, PROMPT + 1, 2**31 - 1, -(2**31))
LAYERS = (0, 1, 1, 2, -1, 2**31 - 1, -(2**31), 0, 1)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("name", jaxkv.PRESETS)
def test_appends_write_inside(name: str, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of one row, and prompts longer than most rings, with lengths and layers that are
    wrong, in empty and in full caches of two layers."""
    monkeypatch.setattr(platform, "is_tiled", lambda: tiled)
    sinks = jaxkv.PRESETS[name][0].get("sink_tokens", 0)
    config = jaxkv.preset(name, max_tokens=40 + sinks + 96, **SMALL)
    for rows, size in ((1, 1), (2, PROMPT)):
        new = jnp.ones((rows, size, HEADS, HEAD_DIM))

        def step(state: CacheState, lengths: Any, layer: Any, new: jax.Array = new) -> CacheState:
            return jaxkv.append(state, new, new, lengths, layer=layer)

        count = jax.jit(audited(step))
        for state in states(config, rows, 2):
            for given, layer in zip(COUNTS, LAYERS, strict=True):
                lengths = jnp.array([given, 1][:rows], jnp.int32)
                assert count(state, lengths, jnp.int32(layer)) == 0


def test_rows_are_put_inside() -> None:
    """Rows that are not there, and rows named twice."""
    config = jaxkv.preset("Q4", max_tokens=64, **SMALL)
    state, new = states(config, 3, None)[1], jaxkv.init(config, 2)
    count = jax.jit(audited(jaxkv.replace_rows))
    for rows in ((0, 2), (1, 1), (-1, 3), (2**31 - 1, -(2**31))):
        assert count(state, jnp.asarray(rows), new) == 0
