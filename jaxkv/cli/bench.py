"""`jaxkv bench`: milliseconds of an append and an attend on this device, next to fp16."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxkv
from jaxkv.cli.common import add_config, fields_of, human
from jaxkv.plan import state_bytes


def add_to(commands: Any) -> None:
    """Adds the command and its flags."""
    command = commands.add_parser("bench", help="milliseconds per append and attend on this device")
    command.set_defaults(run=run)
    command.add_argument("--heads", type=int, help="query heads; default four per kv head")
    command.add_argument("--repeats", type=int, default=30)
    add_config(command, with_model=False)


def run(options: argparse.Namespace) -> None:
    """Times a preset and fp16, and prints both."""
    sizes = {"num_kv_heads": options.kv_heads, "head_dim": options.head_dim}
    config = jaxkv.preset(options.preset, max_tokens=options.context, **sizes, **fields_of(options))
    heads = options.heads or 4 * options.kv_heads
    exact, eager = jaxkv.Precision.FP16, jaxkv.Migration.EAGER
    fp16 = dataclasses.replace(
        config,
        store_precision=exact,
        tail_precision=exact,
        warm_length=0,
        key_quant=None,
        value_quant=None,
        migration=eager,
    )
    rows = {
        name: time_step(c, heads, options.batch, options.repeats)
        for name, c in ((options.preset, config), ("fp16", fp16))
    }
    if options.json:
        print(
            json.dumps(
                {"device": str(jax.devices()[0]), "jax": jax.__version__, "caches": rows}, indent=2
            )
        )
        return
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {options.batch} x "
        f"{config.max_tokens:,} tokens, full; medians\n"
    )
    print(
        f"{'cache':10}{'bytes':>12}{'append ms':>12}{'attend ms':>12}{'both ms':>12}"
        f"{'compile s':>12}"
    )
    for name, row in rows.items():
        print(
            f"{name:10}{human(row['bytes']):>12}{row['append']:12.3f}{row['attend']:12.3f}"
            f"{row['both']:12.3f}{row['compile']:12.1f}"
        )


def time_step(config: jaxkv.KvCacheConfig, heads: int, batch: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a step of decoding on a full cache of one layer, seconds to compile it."""
    key, sizes = jax.random.key(0), (batch, 1, config.num_kv_heads, config.head_dim)
    new = jax.random.normal(key, sizes)
    query = jax.random.normal(key, (batch, 1, heads, config.head_dim))
    chunk = jax.random.normal(key, (batch, min(512, config.max_tokens), *sizes[2:]))
    fill = jax.jit(jaxkv.append, donate_argnums=0)
    state = jaxkv.init(config, batch)
    for _ in range(-(-config.max_tokens // chunk.shape[1])):
        state = fill(state, chunk, chunk)

    def both(state: jaxkv.CacheState) -> Any:
        state = jaxkv.append(state, new, new)
        return state, jaxkv.attend(state, query)

    steps = {
        "append": jax.jit(
            lambda state: (jaxkv.append(state, new, new), jnp.zeros(())), donate_argnums=0
        ),
        "attend": jax.jit(lambda state: (state, jaxkv.attend(state, query)), donate_argnums=0),
        "both": jax.jit(both, donate_argnums=0),
    }
    found: dict[str, Any] = {"bytes": state_bytes(config, None, batch)}
    for name, step in steps.items():
        start = time.perf_counter()
        compiled = step.lower(state).compile()
        found["compile"] = time.perf_counter() - start
        found[name], state = _median(compiled, state, repeats)
    return found


def _median(
    step: Callable[..., Any], state: jaxkv.CacheState, repeats: int
) -> tuple[float, jaxkv.CacheState]:
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[3:]), state
