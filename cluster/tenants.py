"""Where tenants come from: a YAML file, or an environment variable with tokens. Fails closed: whoever asks for tenants
and names none, or names them wrongly, does not get an open server."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

FILE_VARIABLE = "TWINRING_TENANTS_FILE"
TOKENS_VARIABLE = "TWINRING_TOKENS"
MIN_TOKEN_LEN = 16


def read_tenants_file(path: str) -> list[dict[str, Any]]:
    """The entries under `tenants`, still to be validated. ValueError where there are none."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"tenants_file {path!r}: {error}") from error
    entries = tree.get("tenants") if isinstance(tree, dict) and set(tree) == {"tenants"} else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(
            f"tenants_file {path!r}: expected a list of at least one tenant under `tenants` and nothing else"
        )
    return entries


def parse_tokens(tokens: str) -> list[dict[str, Any]]:
    """From "name=token,name2=token2". The first tenant is an operator."""
    entries = []
    for index, pair in enumerate(tokens.split(",")):
        name, equals, token = (part.strip() for part in pair.partition("="))
        if not equals or not name or len(token) < MIN_TOKEN_LEN:
            raise ValueError(  # without the token: this goes to a log
                f"{TOKENS_VARIABLE}: entry {index + 1} is not name=token, of {MIN_TOKEN_LEN} characters or more"
            )
        entries.append({"name": name, "token_sha256": hash_of(token), "is_operator": index == 0})
    return entries


def hash_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
