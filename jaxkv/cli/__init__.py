"""The command line, `python -m jaxkv` or `jaxkv`: a file for each command.

    plan        what a cache takes before it is made; which preset does it (--auto)
    bench       how fast it is here, and beside jax.nn (--compare)
    info        versions, devices, and which implementation each preset gets here
    show        what a saved cache holds
    diagnose    which layers of a saved cache lose

Exit codes: 0 done; 1 `diagnose` found a layer that loses; 2 what was asked for cannot be (a
sentence on stderr says why). `--json` prints for programs, progress goes to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jaxkv
from jaxkv.cli import bench, diagnose, info, plan, show

COMMANDS = (plan, bench, info, show, diagnose)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="jaxkv", description="Quantized key/value caches for decoding language models."
    )
    parser.add_argument("--version", action="version", version=f"jaxkv {jaxkv.__version__}")
    commands = parser.add_subparsers(required=True, metavar="{plan,bench,info,show,diagnose}")
    for command in COMMANDS:
        command.add_to(commands)
    options = parser.parse_args(arguments)
    try:
        code: int | None = options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code or 0
