"""The two texts that come with the examples: prose and technical English, over 50,000 tokens
each."""

import pathlib

DATA = pathlib.Path(__file__).parent / "data"  # its LICENSES.txt says where the texts come from
TEXTS = ("prose", "technical")


def read_text(name: str) -> str:
    """The text called `name`, one of `TEXTS`, or the contents of the file at that path."""
    path = DATA / f"{name}.txt" if name in TEXTS else pathlib.Path(name)
    if not path.is_file():
        raise ValueError(f"no text {name!r}: give the path of a file, or one of {', '.join(TEXTS)}")
    return path.read_text(encoding="utf-8")
