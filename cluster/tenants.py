"""Where tenants come from: a YAML file, or an environment variable with tokens. Fails closed: whoever asks for tenants
and names none, or names them wrongly, does not get an open server. Errors name fields, never values: a token may stand
where only its hash belongs."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from router.tenants import TenantConfig, refuse_repeated

FILE_VARIABLE = "TWINRING_TENANTS_FILE"
TOKENS_VARIABLE = "TWINRING_TOKENS"
MIN_TOKEN_LEN = 16


def read_tenants_file(path: str) -> tuple[TenantConfig, ...]:
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"tenants_file {path!r}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # the error itself quotes the file
        raise ValueError(f"tenants_file {path!r}: not YAML{f', at line {mark.line + 1}' if mark else ''}") from None
    entries = tree.get("tenants") if isinstance(tree, dict) and set(tree) == {"tenants"} else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(
            f"tenants_file {path!r}: expected a list of at least one tenant under `tenants` and nothing else"
        )
    tenants = tuple(_tenant(entry, f"tenants_file {path!r}: tenant {at}") for at, entry in enumerate(entries, 1))
    refuse_repeated(tenants)
    return tenants


def parse_tokens(tokens: str) -> tuple[TenantConfig, ...]:
    """From "name=token,name2=token2". The first tenant is an operator."""
    tenants = []
    for index, pair in enumerate(tokens.split(",")):
        name, equals, token = (part.strip() for part in pair.partition("="))
        if not equals or not name or len(token) < MIN_TOKEN_LEN or not (token.isascii() and token.isprintable()):
            raise ValueError(
                f"{TOKENS_VARIABLE}: entry {index + 1} is not name=token, of {MIN_TOKEN_LEN} ASCII characters or more"
            )
        tenants.append(TenantConfig(name, hash_of(token), is_operator=index == 0))
    refuse_repeated(tenants)
    return tuple(tenants)


def hash_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _tenant(entry: dict[Any, Any], where: str) -> TenantConfig:
    """A mistyped limit would be no limit: unknown fields are refused."""
    known = [field.name for field in dataclasses.fields(TenantConfig)]
    for name in entry:
        if name not in known:
            raise ValueError(f"{where}: unknown field {name}; known: {', '.join(known)}")
    try:
        return TypeAdapter(TenantConfig).validate_python(entry)
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]
        message = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {' '.join(map(str, [*problem['loc'], message]))}") from None
