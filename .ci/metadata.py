"""README as PyPI's page shows it: relative pictures break there, so each is named instead."""

import pathlib
import re

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Readme(MetadataHookInterface):
    """Gives the package its long description (`dynamic` in pyproject.toml)."""

    def update(self, metadata: dict) -> None:
        text = (pathlib.Path(self.root) / "README.md").read_text(encoding="utf-8")
        named = re.sub(
            r"!\[(.*?)\]\((?!https?:)(.*?)\)", r"*Picture, in the repository: \1 (`\2`)*", text
        )
        metadata["readme"] = {"content-type": "text/markdown", "text": named}
