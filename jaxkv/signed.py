"""A safetensors file that says what it has to be: it carries the SHA-256 of all its bytes, and is
read with nothing taken on trust. What is refused has cost no more memory than the file is long."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import mmap as memory_map
import os
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = 2
"""Raised when the layout of a file, or the meaning of what is in it, changes."""

NO_DIGEST = "0" * 64

MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What reading a header that no `save` has written may raise."""

_DTYPES = {
    "I8": "int8", "U8": "uint8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "F16": "float16", "F32": "float32", "F64": "float64", "BOOL": "bool",
}  # fmt: skip


class StorageError(ValueError):
    """A file is not what `load` was asked for: cut short, altered, or of another version or config.
    Nothing was changed."""


@dataclasses.dataclass(frozen=True)
class SignedFile:
    """The bytes of a file, every one as it was written, and its header."""

    path: str
    buffer: Any
    header: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str], mmap: bool) -> SignedFile:
        """Reads or maps a file.

        Raises:
          StorageError: it is not whole, or of another version.
        """
        with open(path, "rb") as file:
            is_empty = os.fstat(file.fileno()).st_size == 0
            buffer = (
                memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_READ)
                if mmap and not is_empty
                else file.read()
            )
        return cls(os.fspath(path), buffer, _verified(os.fspath(path), buffer))

    def metadata(self, name: str) -> Any:
        """A field of the metadata that holds JSON."""
        return json.loads(self.header["__metadata__"][name])

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """An array that must have this shape and dtype, read-only, in the file's own memory.

        Raises:
          StorageError: the file has none, or another.
        """
        try:
            entry, first = self.header[name], _header_end(self.buffer)
            begin, end = (int(offset) for offset in entry["data_offsets"])
            found = (tuple(entry["shape"]), np.dtype(_DTYPES[entry["dtype"]]))
            size = math.prod(shape) * np.dtype(dtype).itemsize
            is_there = 0 <= begin <= end <= len(self.buffer) - first and end - begin == size
            if found != (shape, np.dtype(dtype)) or not is_there:
                raise ValueError(f"{name} is {entry}, not {shape} of {np.dtype(dtype)}")
            return np.frombuffer(self.buffer, dtype, math.prod(shape), first + begin).reshape(shape)
        except MALFORMED as error:
            raise self.malformed(error) from None

    def malformed(self, error: BaseException) -> StorageError:
        return StorageError(
            f"{self.path} has a header that no save writes ({error!r:.200}): save the state anew"
        )


def sign(descriptor: int) -> None:
    """Writes a file's digest into the place kept for it."""
    with memory_map.mmap(descriptor, 0) as buffer:
        place, _ = _field(buffer, "sha256")
        buffer[place : place + len(NO_DIGEST)] = _digest(buffer, place).encode()
        buffer.flush()


def _verified(path: str, buffer: Any) -> dict[str, Any]:
    """The header of a file, once every byte has been found to be as it was written."""
    try:
        _, version = _field(buffer, "jaxkv_version")
        place, digest = _field(buffer, "sha256")
    except ValueError:
        raise StorageError(
            f"{path} is no jaxkv file, or is cut short: save the state anew"
        ) from None
    if version != str(VERSION):
        raise StorageError(
            f"{path} has version {version}, this jaxkv reads version {VERSION}: load it with the "
            "one that saved it"
        )
    if digest != _digest(buffer, place):
        raise StorageError(
            f"{path} is cut short or altered (its checksum differs): save the state anew"
        )
    try:
        header = json.loads(buffer[8 : _header_end(buffer)])
        return dict(header) if isinstance(header["__metadata__"], dict) else {}
    except MALFORMED as error:
        raise StorageError(f"{path} has a header that no save writes ({error!r:.200})") from None


def _field(buffer: Any, name: str) -> tuple[int, str]:
    """Where in the header the value of a metadata field is, and the value."""
    found = re.search(rb'"%s":"([^"]*)"' % name.encode(), buffer[8 : _header_end(buffer)])
    if found is None:
        raise ValueError(f"no field {name}")
    return 8 + found.start(1), found[1].decode(errors="replace")


def _header_end(buffer: Any) -> int:
    return 8 + int.from_bytes(buffer[:8], "little")


def _digest(buffer: Any, place: int) -> str:
    """The SHA-256 of a file with zeros for the digest at `place`."""
    found, view = hashlib.sha256(), memoryview(buffer)
    for part in (view[:place], NO_DIGEST.encode(), view[place + len(NO_DIGEST) :]):
        found.update(part)
        if isinstance(part, memoryview):
            part.release()
    view.release()
    return found.hexdigest()
