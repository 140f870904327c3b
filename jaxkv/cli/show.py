"""`jaxkv show`: what a saved cache holds, tier by tier."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import numpy as np

import jaxkv
from jaxkv.view.draw import draw


def add_to(commands: Any) -> None:
    """Adds the command and its flags."""
    command = commands.add_parser("show", help="what a saved cache holds")
    command.set_defaults(run=run)
    command.add_argument("file", help="what jaxkv.save wrote")
    command.add_argument("--json", action="store_true", help="JSON instead of a drawing")


def run(options: argparse.Namespace) -> None:
    """Prints a saved state's tiers and their counts."""
    state = jaxkv.load(options.file)
    if not options.json:
        print(draw(state))
        return
    counts = {
        field.name: np.asarray(getattr(jaxkv.stats(state), field.name)).tolist()
        for field in dataclasses.fields(jaxkv.KvCacheStats)
    }
    found = {
        "batch_size": state.batch_size,
        "num_layers": state.num_layers,
        "nbytes": jaxkv.nbytes(state),
        "config": dataclasses.asdict(state.config),
        "end": np.asarray(state.end).tolist(),
        "status": np.asarray(state.status).tolist(),
        "stats": counts,
    }
    print(json.dumps(found, indent=2))
