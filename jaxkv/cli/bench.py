"""`jaxkv bench`: how long a step of decoding and a prompt take on this device, beside fp16 and
beside what JAX has."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import jax

import jaxkv
from jaxkv.cli import timing
from jaxkv.cli.common import add_config, fields_of, human

COLUMNS = ("append", "attend", "both", "prompt")
"""What is timed, in milliseconds."""


def add_to(commands: Any) -> None:
    """Adds the command and its flags."""
    command = commands.add_parser("bench", help="milliseconds of append, attend and a prompt here")
    command.set_defaults(run=run)
    command.add_argument("--heads", type=int, help="query heads; default four per kv head")
    command.add_argument(
        "--prompt", type=int, default=512, help="tokens of the prompt; default 512"
    )
    command.add_argument("--repeats", type=int, default=30)
    command.add_argument(
        "--compare", action="store_true", help="beside jax.nn.dot_product_attention in bfloat16"
    )
    add_config(command, with_model=False)


def run(options: argparse.Namespace) -> None:
    """Times a preset and fp16, and prints both."""
    if options.repeats < 1:
        raise ValueError(f"--repeats {options.repeats}: must be at least 1")
    sizes = {"num_kv_heads": options.kv_heads, "head_dim": options.head_dim}
    config = jaxkv.preset(options.preset, max_tokens=options.context, **sizes, **fields_of(options))
    task = timing.Task(
        heads=options.heads or 4 * options.kv_heads,
        batch=options.batch,
        prompt=min(options.prompt, config.max_tokens),
        repeats=options.repeats,
    )
    found = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        **measured(options.preset, config, task, options.compare),
    }
    print(json.dumps(found, indent=2) if options.json else table(found, config, task))


def measured(
    name: str, config: jaxkv.KvCacheConfig, task: timing.Task, compare: bool
) -> dict[str, Any]:
    """The memory's bandwidth, and the times of each cache with its share of it."""
    bandwidth = timing.bandwidth(task.repeats)
    rows = {
        label: timing.of_cache(label, cache, task)
        for label, cache in ((name, config), ("fp16", unquantized(config)))
    }
    if compare:
        rows["jax.nn"] = timing.of_jax(config, task)
    for row in rows.values():
        row["GB/s"] = row["bytes"] / row["attend"] / 1e6
        row["share"] = row["GB/s"] / bandwidth
    return {"bandwidth": bandwidth, "caches": rows}


def unquantized(config: jaxkv.KvCacheConfig) -> jaxkv.KvCacheConfig:
    """The same tokens in fp16, tier by tier."""
    return dataclasses.replace(
        config,
        store_precision=jaxkv.Precision.FP16,
        tail_precision=jaxkv.Precision.FP16,
        warm_length=0,
        key_quant=None,
        value_quant=None,
        migration=jaxkv.Migration.EAGER,
    )


def table(found: dict[str, Any], config: jaxkv.KvCacheConfig, task: timing.Task) -> str:
    """For people."""
    lines = [
        f"{found['device']}, jax {found['jax']}; {task.batch} x {config.max_tokens:,} tokens, "
        f"full; a prompt of {task.prompt:,}; medians",
        f"this device reads {found['bandwidth']:.1f} GB/s (the sum of a large array)",
        "",
        f"{'cache':10}{'bytes':>11}"
        + "".join(f"{name + ' ms':>12}" for name in COLUMNS)
        + f"{'GB/s':>8}{'of it':>7}{'compile s':>11}",
    ]
    for name, row in found["caches"].items():
        times = "".join(f"{row[c]:12.3f}" if c in row else f"{'-':>12}" for c in COLUMNS)
        lines.append(
            f"{name:10}{human(row['bytes']):>11}{times}{row['GB/s']:8.1f}{row['share']:7.0%}"
            f"{row['compile']:11.1f}"
        )
    return "\n".join(lines)
