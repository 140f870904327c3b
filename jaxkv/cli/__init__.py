"""The command line, `python -m jaxkv` or `jaxkv`: a file for each command.

    plan    what a cache takes before it is made
    bench   how fast it is here
    info    versions, devices, and which implementation each preset gets here
    show    what a saved cache holds

Exit codes: 0 done, 2 what was asked for cannot be (a sentence on stderr says why).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jaxkv.cli import bench, info, plan, show

COMMANDS = (plan, bench, info, show)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 2 where what was asked for cannot be."""
    parser = argparse.ArgumentParser(
        prog="jaxkv", description="Quantized key/value caches for decoding language models."
    )
    commands = parser.add_subparsers(required=True, metavar="{plan,bench,info,show}")
    for command in COMMANDS:
        command.add_to(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
