"""A worker's costs and memory as JSON text, which `twinring fit` writes and `twinring simulate --hardware` reads. Knows
no files and no fitting; what the writer says about its fit is kept for people and not read."""

from __future__ import annotations

import json
from dataclasses import asdict

from pydantic import TypeAdapter, ValidationError

from protos.cost_model import Hardware

FORMAT = "twinring-hardware"
VERSION = 1


def hardware_to_json(hardware: Hardware, fit: dict[str, object]) -> str:
    document = {"format": FORMAT, "version": VERSION, "hardware": asdict(hardware), "fit": fit}
    return json.dumps(document, indent=2) + "\n"


def hardware_from_json(text: str) -> Hardware:
    """ValueError says what is wrong."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    header = (document.get("format"), document.get("version")) if isinstance(document, dict) else None
    if header != (FORMAT, VERSION):
        raise ValueError(f"not a {FORMAT} file of version {VERSION}")
    try:
        hardware = TypeAdapter(Hardware).validate_python(document.get("hardware"))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, ('hardware', *first['loc'])))}: {first['msg']}") from None
    for name in ("num_kv_tokens", "kv_nbytes_per_token"):
        if getattr(hardware, name) < 1:
            raise ValueError(f"hardware.{name} must be positive, not {getattr(hardware, name)}")
    return hardware
