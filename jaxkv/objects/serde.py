"""Configurations, policies and statistics as dictionaries that JSON can hold, and back."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any, TypeVar

import numpy as np

from jaxkv.objects.errors import KvCacheError
from jaxkv.objects.policy import CacheQuantization, HighPrecisionTail, Hybrid, QuantizedStore

T = TypeVar("T")

_POLICIES = {kind.__name__: kind for kind in (HighPrecisionTail, QuantizedStore, Hybrid)}


def to_dict(value: Any) -> Any:
    """A configuration, policy, statistic or tier as dictionaries, lists, strings and numbers.

    A policy becomes `{name: fields}`, as the original's serde writes it.
    """
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
        return {type(value).__name__: fields} if isinstance(value, CacheQuantization) else fields
    if isinstance(value, tuple):
        return [to_dict(item) for item in value]
    return (
        value
        if value is None or isinstance(value, (bool, int, float, str))
        else np.asarray(value).tolist()
    )


def from_dict(kind: type[T], data: Any) -> T:
    """The inverse of `to_dict`: `from_dict(KvCacheConfig, data)`, `from_dict(CacheQuantization,
    data)`. Missing fields take their defaults.

    Raises:
      KvCacheError: an unknown key, a missing field without a default, or a value of the wrong type.
    """
    if issubclass(kind, CacheQuantization):
        known = sorted(name for name, policy in _POLICIES.items() if issubclass(policy, kind))
        if not isinstance(data, dict) or len(data) != 1 or not data.keys() <= set(known):
            raise KvCacheError(f"{data!r}: a policy is a dictionary with one key, of {known}")
        [(name, fields)] = data.items()
        return typing.cast(T, _fields(_POLICIES[name], fields))
    return typing.cast(T, _read(kind, data, kind.__name__))


def _fields(kind: type[Any], data: Any) -> Any:
    if not isinstance(data, dict):
        raise KvCacheError(f"{kind.__name__} is read from a dictionary, not from {data!r}")
    known = {field.name for field in dataclasses.fields(kind)}
    if not data.keys() <= known:
        raise KvCacheError(
            f"unknown keys {sorted(map(str, data.keys() - known))}: {kind.__name__} has "
            f"{sorted(known)}"
        )
    hints = typing.get_type_hints(kind)
    try:
        return kind(
            **{
                name: _read(hints[name], value, f"{kind.__name__}.{name}")
                for name, value in data.items()
            }
        )
    except (TypeError, ValueError) as error:
        raise KvCacheError(f"{kind.__name__}: {error}") from error


def _read(hint: Any, value: Any, where: str) -> Any:
    """A value of the type `hint`, found at `where`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if (value is None and type(None) in options) or hint is Any:
        return value
    kind = options[0]
    if typing.get_origin(kind) is tuple:
        return tuple(_read(typing.get_args(kind)[0], item, where) for item in value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _fields(kind, value)
    if issubclass(kind, enum.Enum):
        try:
            return kind(
                value.lower() if isinstance(value, str) else value
            )  # the original writes FP16 and Hot
        except ValueError:
            raise KvCacheError(
                f"{where}={value!r}: must be one of {[member.value for member in kind]}"
            ) from None
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise KvCacheError(f"{where}={value!r}: must be of type {kind.__name__}")
    return value
