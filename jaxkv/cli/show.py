"""`jaxkv show`: what a saved cache holds, tier by tier."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import numpy as np

import jaxkv
from jaxkv.cli.common import states_in
from jaxkv.view.draw import draw


def add_to(commands: Any) -> None:
    """Adds the command and its flags."""
    command = commands.add_parser("show", help="what a saved cache holds")
    command.set_defaults(run=run)
    command.add_argument("file", help="what jaxkv.save wrote")
    command.add_argument("--json", action="store_true", help="JSON instead of a drawing")


def run(options: argparse.Namespace) -> None:
    """Prints a saved state's tiers and their counts; of `Layers`, each stack's."""
    states = states_in(options.file)
    if not options.json:
        print("\n\n".join(map(draw, states)))
        return
    found = [as_dict(state) for state in states]
    print(json.dumps(found[0] if len(found) == 1 else {"stacks": found}, indent=2))


def as_dict(state: jaxkv.CacheState) -> dict[str, Any]:
    """What a program may want to know of a state."""
    counts = {
        field.name: np.asarray(getattr(jaxkv.stats(state), field.name)).tolist()
        for field in dataclasses.fields(jaxkv.KvCacheStats)
    }
    return {
        "batch_size": state.batch_size,
        "num_layers": state.num_layers,
        "nbytes": jaxkv.nbytes(state),
        "config": dataclasses.asdict(state.config),
        "end": np.asarray(state.end).tolist(),
        "status": np.asarray(state.status).tolist(),
        "stats": counts,
    }
