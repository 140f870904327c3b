"""README keeps its word: its Python runs, and its floors are the code's."""

import ast
import contextlib
import pathlib
import re
import subprocess
import sys

import pytest

import jaxkv

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


GIVEN = {
    "Quickstart": "",
    "In other packages": """
import jax, jaxkv
config = jaxkv.preset("q4", max_tokens=64, num_kv_heads=8, head_dim=8)
batch_size, x = 2, jax.random.normal(jax.random.key(0), (2, 5, 64))
""",
    "Rows that come and go": """
import jaxkv, numpy as np
config = jaxkv.KvCacheConfig(4, max_tokens=16, num_kv_heads=1, head_dim=8, rewind_length=2)
new = np.ones((2, 6, 1, 8), np.float32)
state = other = jaxkv.append(jaxkv.init(config, 2), new, new)
rejected, parents, row, fresh = np.array([1, 2]), [1, 1], 0, jaxkv.init(config, 1)
""",
    "A pool of pages": """
import jaxkv, numpy as np
config = jaxkv.KvCacheConfig(4, max_tokens=256, num_kv_heads=1, head_dim=8)
keys = values = np.ones((4, 6, 1, 8), np.float32)
lengths, source, target, rows, row = np.array([6, 6, 0, 3]), 0, 2, [1], 3
""",
    "Reading, and keeping, only the pages that matter": """
import jaxkv, numpy as np
from jaxkv import paged
config = jaxkv.KvCacheConfig(4, max_tokens=256, num_kv_heads=1, head_dim=8)
query = np.ones((4, 1, 2, 8), np.float32)
""",
    "On disk": """
import jaxkv
config = jaxkv.KvCacheConfig(4, max_tokens=16, num_kv_heads=1, head_dim=8)
state = jaxkv.init(config)
""",
    "Many devices": """
import jax, jaxkv
config = jaxkv.KvCacheConfig(4, max_tokens=16, num_kv_heads=4, head_dim=8)
""",
    "The object API": """
import jaxkv, numpy as np
keys = values = np.ones((5, 8, 128), np.float32)
query = np.ones((32, 128), np.float32)
""",
    "Speed": """
import jax, jaxkv
config = jaxkv.KvCacheConfig(4, max_tokens=16, num_kv_heads=2, head_dim=8)
""",
    "Changing it: a new format, from its recipe to the test that holds it": "import jaxkv\n",
}
"""Heading -> what README's Python below it takes for granted."""

FOREIGN = ("gemma", "tunix")
"""Packages that are not among the tests' own: `tests/with_gemma.py` and `with_tunix.py`."""


SLOW = ("In other packages", "Rows that come and go", "A pool of pages", "The object API")


def blocks() -> list[tuple[str, str]]:
    """README's Python, each block with the heading above it."""
    found, heading = [], ""
    for match in re.finditer(r"^#+ ([^\n]*)$|^```python\n(.*?)```", README, re.M | re.S):
        heading = match[1] or heading
        if match[2]:
            found.append((heading, match[2]))
    return found


@pytest.mark.parametrize(
    ("heading", "code"),
    [
        pytest.param(*block, id=block[0][:20], marks=[pytest.mark.slow] * (block[0] in SLOW))
        for block in blocks()
    ],
)
def test_python_runs(heading, code, tmp_path):
    """As it stands, in a process of its own where it asks for devices."""
    code = GIVEN[heading] + code
    if any(f"integrations.{name}" in code for name in FOREIGN):
        compile(code, "README", "exec")
    elif "jax_num_cpu_devices" in code:
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    else:
        with contextlib.chdir(tmp_path):
            exec(compile(code, "README", "exec"), {})


@pytest.mark.slow
def test_quickstart_says_what_it_holds(capsys):
    """300 tokens in a tail of 256 leave 256 there and 44 in the store."""
    exec(compile(dict(blocks())["Quickstart"], "README", "exec"), {})
    assert capsys.readouterr().out.startswith("[256] [44] ")


def test_every_public_name_is_there():
    """`__all__` has no name twice and none that is missing."""
    assert len(set(jaxkv.__all__)) == len(jaxkv.__all__)
    assert all(hasattr(jaxkv, name) for name in jaxkv.__all__)


def floors() -> dict[str, int]:
    """Module -> floor, as README's picture says; names on a line after `floor n` share it."""
    found = {}
    for line in re.search(r"## How it is built\n(.*?)\n## ", README, re.S)[1].splitlines():
        if floor := re.search(r"floor (\d+)", line):
            for name in re.findall(r"(?:jaxkv/)?(\w+)(?:\.py|/ )", line):
                found[name] = int(floor[1])
    return found


def test_imports_go_only_to_lower_floors():
    """A module imports from jaxkv only what stands on a lower floor (within a folder, anything
    without a circle)."""
    known = floors()
    for path in (ROOT / "jaxkv").rglob("*.py"):
        name = path.parent.name if path.parent.name != "jaxkv" else path.stem
        if name.startswith("__"):
            continue
        assert name in known, f"README does not say on which floor {path.name} stands"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxkv"):
                parts = node.module.split(".")
                targets = parts[1:2] or [alias.name for alias in node.names]
                for target in targets:
                    assert target == name or known[target] < known[name], (
                        f"{path.name} imports {target}, which is not below it"
                    )
