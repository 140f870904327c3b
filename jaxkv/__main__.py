"""`python -m jaxkv`: see `jaxkv.cli`."""

from __future__ import annotations

import sys

from jaxkv.cli import main

if __name__ == "__main__":
    sys.exit(main())
