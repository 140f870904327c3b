"""What the TPU's own compiler makes of decode steps, on a machine without a TPU. Skipped where
libtpu is not installed (`pip install libtpu`, 500 MB)."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "benchmarks" / "tpu_compile.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
    ),
]


@pytest.mark.parametrize("name", ["FP16", "Q8", "Q4", "Q4_BIAS", "Q2"])
def test_nothing_of_the_cache_is_copied(name: str, tmp_path: pathlib.Path) -> None:
    """Over a scan of layers, 32,768 tokens: no copy, temporaries and code of a few MB."""
    out = tmp_path / "tpu.json"
    steps = ["append", "attend", "append and attend"]
    arguments = ["--out", str(out), "--preset", name, "--only-scan"]
    for step in steps:
        arguments += ["--step", step]
    subprocess.run([sys.executable, SCRIPT, *arguments], check=True)
    programs = json.loads(out.read_text())["programs"].values()
    assert [row["step"] for row in programs] == steps
    for row in programs:
        assert row["cache_sized_copies"] == 0
        assert row["temporaries_mb"] < 8
        assert row["code_mb"] < 8
