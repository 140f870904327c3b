"""The public verbs: each takes the state of one layer or of a stack of layers, or a model's
`Layers`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

from jaxkv import batch, drop, storage, update
from jaxkv.attend import attend as attend_state
from jaxkv.drafts import keep as keep_state
from jaxkv.extend import extend as extend_state
from jaxkv.extend import prefill as prefill_state
from jaxkv.gather import gather as gather_state
from jaxkv.models import files, verbs
from jaxkv.models.layers import Layers
from jaxkv.padding import positions as positions_state
from jaxkv.state import CacheState
from jaxkv.stats import stats as stats_state

Verb = TypeVar("Verb", bound=Callable[..., Any])


def _either(of_state: Verb, of_layers: Callable[..., Any]) -> Verb:
    """The verb that looks at what it is given first."""

    @functools.wraps(of_state)
    def verb(*args: Any, **named: Any) -> Any:
        first = args[0] if args else next(iter(named.values()), None)
        if isinstance(first, list | tuple) and first:
            first = first[0]
        return (of_layers if isinstance(first, Layers) else of_state)(*args, **named)

    return cast(Verb, verb)


append = _either(update.append, verbs.append)
attend = _either(attend_state, verbs.attend)
extend = _either(extend_state, verbs.extend)
prefill = _either(prefill_state, verbs.prefill)
gather = _either(gather_state, verbs.gather)
evict = _either(drop.evict, verbs.evict)
rewind = _either(drop.rewind, verbs.rewind)
clear = _either(drop.clear, verbs.clear)
take_rows = _either(batch.take_rows, verbs.take_rows)
concatenate = _either(batch.concatenate, verbs.concatenate)
replace_rows = _either(batch.replace_rows, verbs.replace_rows)
keep = _either(keep_state, verbs.keep)
positions = _either(positions_state, verbs.positions)
stats = _either(stats_state, verbs.stats)


def save(path: str | os.PathLike[str], state: CacheState | Layers) -> None:
    """`storage.save` of a state, or of `Layers`, which `load_layers` reads."""
    if isinstance(state, Layers):
        files.save(path, state)
    else:
        storage.save(path, state)


load_layers = files.load
