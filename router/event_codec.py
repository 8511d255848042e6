"""A router's events as JSON, and back: fields by name where they differ from their defaults, bytes as hex, arrays and
tuples as lists. Knows no file; recording.py and simulator/replay.py do."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable
from dataclasses import replace
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from protos.types import GenerateRequest
from router.config import RouterConfig
from router.events import Effect, Event, Fail, Send

Json = Any  # what json.dumps takes and json.loads gives
NO_TOKENS = array("i")
KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}


def encode_event(event: Event) -> Json:
    return {"kind": type(event).__name__, **encode(event)}


def decode_event(value: Json) -> Event:
    """ValueError, KeyError or TypeError where it is none."""
    fields = dict(value)
    event: Event = decode(fields, KINDS[fields.pop("kind")])
    return event


def encode_config(config: RouterConfig) -> Json:
    """What placement goes by: who may call, and where from, stays out."""
    return encode(replace(config, tenants=(), listen="", http_listen="", tls_cert=None, tls_key=None))


def decode_config(value: Json) -> RouterConfig:
    config: RouterConfig = decode(value, RouterConfig)
    return config


def encode_choices(effects: Iterable[Effect]) -> Json:
    """What was decided: which worker is to do what, with which end of which transfer; and who is refused, or fails."""
    choices: list[Json] = []
    for effect in effects:
        if isinstance(effect, Send):
            submits = [_submit(request) for request in effect.submits]
            choices.append(
                [effect.worker_id, submits, encode(effect.retargets), encode(effect.migrates), encode(effect.aborts)]
            )
        elif isinstance(effect, Fail):
            choices.append([effect.request_id, effect.code, encode(effect.refused_for)])
    return choices


def _submit(request: GenerateRequest) -> Json:
    """How many tokens instead of which: those came with the events."""
    return [len(request.token_ids), encode(replace(request, token_ids=NO_TOKENS))]


# --- values -------------------------------------------------------------------------------------------------------


def encode(value: object) -> Json:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: encode(part) for field, part in fields if part != field.default}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple | list | array):
        return [encode(part) for part in value]
    assert value is None or isinstance(value, str | int | float), value
    return value


def decode(value: Json, hint: Any) -> Any:
    """As the type annotation says."""
    if get_origin(hint) in (Union, UnionType):
        (inner,) = (part for part in get_args(hint) if part is not NoneType)
        return None if value is None else decode(value, inner)
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        hints = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(decode(part, each) for part, each in zip(value, hints, strict=True))
    if get_origin(hint) is list:
        return array("i", value)
    if get_origin(hint) is Literal:
        return value
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        hints_by_name = _hints(hint)
        return hint(**{name: decode(part, hints_by_name[name]) for name, part in value.items()})
    if issubclass(hint, Enum):
        return hint(value)
    return bytes.fromhex(value) if hint is bytes else value


@cache
def _hints(kind: type) -> dict[str, Any]:
    """array[int] is for type checkers only; at run time an array has no parts to name."""
    return get_type_hints(kind, localns={"array": list})
