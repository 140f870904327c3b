"""One compilation for a step, wherever its arguments have been put; programs that travel."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import KvCacheConfig, TwoTierKvCache

pytestmark = pytest.mark.slow

CONFIG = KvCacheConfig(4, max_tokens=16, num_kv_heads=2, head_dim=16)
ONE, QUERY = np.ones((1, 1, 2, 16), np.float32), np.ones((1, 1, 4, 16), np.float32)


def step(state: Any, query: Any, keys: Any) -> Any:
    state = jaxkv.append(state, keys, keys)
    return state, jaxkv.attend(state, query)


def programs(caplog: pytest.LogCaptureFixture, call: Callable[[], Any]) -> int:
    """How many programs a call compiles."""
    caplog.clear()
    with jax.log_compiles():
        call()
    return sum("Finished XLA compilation" in record.getMessage() for record in caplog.records)


PLACES: dict[str, Callable[[Any], Any]] = {
    "numpy": np.asarray,
    "uncommitted": jnp.asarray,
    "default": lambda x: jax.device_put(x, jax.devices()[0]),
    "another": lambda x: jax.device_put(x, jax.devices()[3]),
}


@pytest.mark.parametrize("donate", [(), (0,)], ids=["kept", "donated"])
@pytest.mark.parametrize("place", PLACES)
def test_a_step_is_compiled_once(place: str, donate: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The second call finds the first one's program, and so does one after any other verb."""
    device = {"default": jax.devices()[0], "another": jax.devices()[3]}.get(place)
    state = jaxkv.init(CONFIG, device=device)
    query, keys = (PLACES[place](x) for x in (QUERY, ONE))
    compiled = jax.jit(step, donate_argnums=donate)
    state, _ = compiled(state, query, keys)
    for verb in (lambda s: s, jaxkv.clear, jaxkv.copy, lambda s: jaxkv.take_rows(s, [0])):
        state = verb(state)
        call = functools.partial(compiled, jaxkv.copy(state), query, keys)
        assert programs(caplog, call) == 0, verb
    assert state.end.devices() == {device or jax.devices()[0]}


@pytest.mark.parametrize("place", PLACES)
def test_objects_compile_once(place: str, caplog: pytest.LogCaptureFixture) -> None:
    """An object lives where its first tokens were put."""
    number = 17 + list(PLACES).index(place)  # a configuration for each
    cache = TwoTierKvCache(KvCacheConfig(4, max_tokens=number, num_kv_heads=2, head_dim=16))
    keys, query = PLACES[place](ONE[0]), PLACES[place](QUERY[0])

    def use() -> None:
        cache.append(keys, keys)
        cache.attend(query)
        cache.stats()

    assert programs(caplog, use) >= 3
    assert programs(caplog, use) == programs(caplog, use) == 0
    assert len(cache) == 3


ALONE = """
import logging, jax, jax.numpy as jnp, numpy as np, jaxkv
config = jaxkv.KvCacheConfig(4, max_tokens=16, num_kv_heads=2, head_dim=16)
state, step = jaxkv.init(config), jax.jit(lambda s, x: jaxkv.append(s, x, x), donate_argnums=0)
token = jax.device_put(jnp.ones((1, 1, 2, 16)), jax.devices()[0])
state = step(state, token)
logs = []
class Keep(logging.Handler):
    def emit(self, record): logs.append(record.getMessage())
logging.getLogger("jax").addHandler(Keep())
with jax.log_compiles():
    step(state, token)
print(sum("Finished XLA compilation" in line for line in logs), state.end.committed)
"""


def run(script: str, *arguments: str) -> str:
    """What a script prints in a process of its own, with one CPU device."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_with_one_device_nothing_needs_to_be_said() -> None:
    assert run(ALONE).split() == ["0", "True"]


# Programs that travel.


LOAD_AND_RUN = """
import sys, jax, numpy as np, jaxkv
from jax import export

folder = sys.argv[1]
program = export.deserialize(open(f"{folder}/step", "rb").read())
state, token, query = jaxkv.load(f"{folder}/state"), *np.load(f"{folder}/arrays.npz").values()
for _ in range(3):
    state, out = program.call(state, query, token)
np.savez(f"{folder}/found.npz", out, *jax.tree.leaves(jaxkv.gather(state)))
print(jax.tree.structure(jaxkv.init(state.config)) == jax.tree.structure(state))
"""
EXPORTED = {
    "plain": CONFIG,
    "chain": KvCacheConfig(
        4,
        "bf16",
        "q4k",
        48,
        2,
        32,
        4,
        sink_tokens=2,
        warm_length=8,
        migration="batched",
        key_quant=jaxkv.QuantSpec(4, 4, axis="channel"),
        window=9,
    ),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_a_step_is_exported_saved_loaded_and_run(name: str, tmp_path: Path) -> None:
    """Another process runs it on a saved cache, and gets the same bits."""
    config, rng = EXPORTED[name], np.random.default_rng(0)
    prompt = rng.normal(size=(1, 11, 2, config.head_dim)).astype(np.float32)
    token, query = prompt[:, :1] + 1, rng.normal(size=(1, 1, 4, config.head_dim)).astype(np.float32)
    state = jax.jit(jaxkv.append)(jaxkv.init(config), prompt, prompt)
    exported = jax.export.export(jax.jit(step))(state, query, token)
    (tmp_path / "step").write_bytes(exported.serialize())
    jaxkv.save(tmp_path / "state", state)
    np.savez(tmp_path / "arrays.npz", token, query)
    assert run(LOAD_AND_RUN, str(tmp_path)).strip() == "True"
    for _ in range(3):
        state, out = jax.jit(step)(state, query, token)
    wanted = [out, *jaxkv.gather(state)]
    for found, one in zip(np.load(tmp_path / "found.npz").values(), wanted, strict=True):
        np.testing.assert_array_equal(found, one)


def test_every_tree_of_ours_can_be_serialized() -> None:
    """Shards, layers, stats, partials: as arguments and as results."""
    from jaxkv.models.layers import Layers
    from jaxkv.models.spec import Kind, LayerSpec, Rotary
    from jaxkv.sharding import Axes
    from jaxkv.shards import Shards

    state = jaxkv.init(CONFIG)
    rotary = Rotary(16, 1e4, (("type", "linear"), ("factor", 2.0)))
    spec = LayerSpec(
        kind=Kind.SLIDING, num_kv_heads=2, head_dim=16, window=4, rotary=rotary, config=CONFIG
    )
    trees = [
        state,
        jaxkv.stats(state),
        Shards(jax.tree.map(lambda leaf: leaf[None], state), state.end, Axes(context="c")),
        Layers((jaxkv.init(CONFIG, 1, 1),), (None,), (spec,)),
    ]
    for tree in trees:
        exported = jax.export.export(jax.jit(lambda x: x))(tree)
        again = jax.export.deserialize(exported.serialize())
        assert again.in_tree == exported.in_tree and again.out_tree == exported.out_tree
        assert jax.tree.structure(again.call(tree)) == jax.tree.structure(tree)
