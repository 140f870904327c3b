"""`jaxkv diagnose`: which layers of a saved cache its store does not fit."""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

import jaxkv
from jaxkv.cli.common import states_in
from jaxkv.diagnose import LOSES


def add_to(commands: Any) -> None:
    """Adds the command and its flags."""
    command = commands.add_parser(
        "diagnose",
        help="which layers of a saved cache lose; exit code 1 if one does",
        description="Puts the exact tokens of the tail through the store's format, layer by layer.",
    )
    command.set_defaults(run=run)
    command.add_argument("file", help="what jaxkv.save wrote, best after 128 tokens or more")
    command.add_argument("--json", action="store_true", help="JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """Prints the errors of scores and values; 1 if a layer loses."""
    found = [as_dict(state) for state in states_in(options.file)]
    if options.json:
        print(json.dumps(found[0] if len(found) == 1 else {"stacks": found}, indent=2))
    else:
        print("\n\n".join(map(table, found)))
    return 1 if any(stack["losing"] for stack in found) else 0


def as_dict(state: jaxkv.CacheState) -> dict[str, Any]:
    """Errors by layer, and the layers that lose."""
    found = jaxkv.diagnose(state)
    return {
        "key_error": worst(found.key_error),
        "value_error": worst(found.value_error),
        "losing": found.losing().tolist(),
    }


def worst(error: Any) -> list[float]:
    """Of [B, K] or [L, B, K] the worst kv head of each layer, over the rows that hold anything."""
    layers = np.asarray(error)
    layers = layers if layers.ndim == 3 else layers[None]
    return [round(float(np.nan_to_num(layer, nan=0.0).max()), 4) for layer in layers]


def table(found: dict[str, Any]) -> str:
    """For people."""
    keys, values, losing = (found[name] for name in ("key_error", "value_error", "losing"))
    lines = [f"{'layer':>5}{'scores off by':>15}{'values off by':>15}"]
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        mark = "  loses" if layer in losing else ""
        lines.append(f"{layer:5}{key:15.3f}{value:15.1%}{mark}")
    advice = (
        f"scores off by more than {LOSES:.2f} change what a model says: more bits there, "
        "KvCacheConfig(rotary=...), or jaxkv.exact_layers"
    )
    return "\n".join([*lines, advice if losing else "no layer loses"])
