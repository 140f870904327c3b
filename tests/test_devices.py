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
