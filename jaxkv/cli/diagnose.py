"""`jaxkv diagnose`: which layers of a saved cache its store does not fit."""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

import jaxkv
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
    found = jaxkv.diagnose(jaxkv.load(options.file))
    keys, values = (worst(x) for x in (found.key_error, found.value_error))
    losing = found.losing().tolist()
    if options.json:
        print(json.dumps({"key_error": keys, "value_error": values, "losing": losing}, indent=2))
    else:
        print(table(keys, values, losing))
    return 1 if losing else 0


def worst(error: Any) -> list[float]:
    """Of [B, K] or [L, B, K] the worst kv head of each layer, over the rows that hold anything."""
    layers = np.asarray(error)
    layers = layers if layers.ndim == 3 else layers[None]
    return [round(float(np.nan_to_num(layer, nan=0.0).max()), 4) for layer in layers]


def table(keys: list[float], values: list[float], losing: list[int]) -> str:
    """For people."""
    lines = [f"{'layer':>5}{'scores off by':>15}{'values off by':>15}"]
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        mark = "  loses" if layer in losing else ""
        lines.append(f"{layer:5}{key:15.3f}{value:15.1%}{mark}")
    advice = (
        f"scores off by more than {LOSES:.2f} change what a model says: more bits there, "
        "KvCacheConfig(rotary=...), or jaxkv.exact_layers"
    )
    return "\n".join([*lines, advice if losing else "no layer loses"])
