"""README keeps its word: its quickstart runs, and its floors are the code's."""

import ast
import pathlib
import re

import jaxkv

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_quickstart_runs(capsys):
    """The quickstart prints what 300 tokens in a tail of 256 must leave: 256 in the tail and 44 in
    the store."""
    code = re.search(r"## Quickstart\n\n```python\n(.*?)```", README, re.S)
    exec(compile(code[1], "README", "exec"), {})
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
