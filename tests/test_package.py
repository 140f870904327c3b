"""What is installed: its version, its size, its types, and what importing it costs."""

from __future__ import annotations

import importlib.metadata
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import jaxkv

PACKAGE = Path(jaxkv.__file__).parent
USER = Path(__file__).parent / "typed_user.py"


def test_version_is_the_metadatas() -> None:
    assert jaxkv.__version__ == importlib.metadata.version("jaxkv")
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert f"version = {{{jaxkv.__version__}}}" in readme  # of the citation
    assert re.search(rf"^\*\*{jaxkv.__version__}\*\*", readme, re.M)  # of the changelog


def test_the_wheel_is_small() -> None:
    """Its code at least: a wheel is a zip of these files, 224 kB of 255 in November 2026."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path in PACKAGE.rglob("*.py"):
            wheel.write(path)
    assert len(packed.getvalue()) < 300_000


def test_importing_it_leaves_out_what_few_need() -> None:
    """Pallas costs as much as all the rest; extras are imported by their integrations alone."""
    heavy = ("pallas", "safetensors", "flax", "equinox", "treescope", "matplotlib")
    code = f"import jaxkv, sys; print([m for m in sys.modules if any(h in m for h in {heavy})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_importing_it_is_cheap() -> None:
    """0.06 s of CPU beyond JAX's own; the least of five, since machines are busy."""
    code = (
        "import jax, time; start = time.process_time(); import jaxkv;"
        "print(time.process_time() - start)"
    )
    run = [sys.executable, "-c", code]
    times = [float(subprocess.check_output(run, text=True)) for _ in range(5)]
    if not sys.dont_write_bytecode:  # else it is compiled each time
        assert min(times) < 0.06


@pytest.mark.slow
def test_a_strict_user_has_types(tmp_path: Path) -> None:
    """As somebody sees them who has installed the package."""
    run = [sys.executable, "-m", "mypy", "--strict", "--config-file=", str(USER)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
