"""Writes docs/configuration.md: every setting with its type, its default and the comment behind its field. Every field
must have one."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import sys
import tokenize
import typing
from collections.abc import Iterator
from pathlib import Path

from cluster.config import DEMO_MODEL, SHARED_SETTINGS, ServeConfig
from router.tenants import TenantConfig

INTRO = """# Configuration

Made by `scripts/gen_docs` from the settings in the code: change it there.

`twinring serve --config FILE` reads YAML; `--set router.max_in_flight=64` sets one value and wins over the file; the
other flags are short for settings (`twinring serve --help`). Unknown names are refused. Times are in seconds (`_s`),
sizes in tokens unless the name or the comment says bytes. `null` stands for a value that is not set.

```yaml
num_prefill: 2
num_decode: 2
engine: {model: /models/qwen3, dtype: bfloat16, device: cuda, kv_cache_bytes: 8589934592}
router: {listen: "0.0.0.0:50051", http_listen: "0.0.0.0:8000", tls_cert: /etc/tls/tls.crt, tls_key: /etc/tls/tls.key}
tenants_file: /etc/twinring/tenants.yaml
```

| Environment | Of | Meaning |
|---|---|---|
| `TWINRING_TENANTS_FILE` | `serve` | `tenants_file`, where that is not set |
| `TWINRING_TOKENS` | `serve` | tenants without a file: `name=token,name2=token2`, the first an operator |
| `RAY_ADDRESS` | `serve` | `ray.address`, where that is not set |
| `HF_HUB_CACHE`, `HF_HOME` | `serve` | where models of the Hugging Face hub are, where `hub_cache` is not set |
| `TWINRING_TOKEN` | clients | as `--token` |
| `TWINRING_CA` | clients | as `--ca` |
"""
TENANTS = """
## The tenants file

`tenants:` with a list of these. `twinring token NAME` makes a token and its entry; the token itself is kept nowhere.
Limits: `null` is none. One that is exceeded refuses with RESOURCE_EXHAUSTED or 429 and a time to come back.

```yaml
tenants:
  - {name: ops, token_sha256: 0f3c..., is_operator: true}
  - {name: shop, token_sha256: 9b1a..., max_concurrent_requests: 32, max_tokens_per_minute: 200000}
```
"""
# Not set where they stand: the first in the tenants file, the others once, in the section that owns them.
NOT_SET_IN_ROUTER = {"tenants", *SHARED_SETTINGS}


def main(path: str) -> None:
    tenant = {field.name: field.default for field in dataclasses.fields(TenantConfig)}
    parts = [INTRO, "\n## Top level\n", *tables("", ServeConfig()), TENANTS, table(TenantConfig, tenant, set())]
    Path(path).write_text("".join(parts))


def tables(name: str, config: object) -> Iterator[str]:
    """Of the settings themselves, then of every section below."""
    values = values_of(config)
    sections = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    may_be_off = {
        name: f"\n{comment[0].upper()}{comment[1:]}.\n" if "null" in type_ else ""
        for name, type_, comment in fields_of(type(config))
    }
    leave_out = NOT_SET_IN_ROUTER if name == "router" else set()
    yield table(type(config), values, leave_out | set(sections))
    for inner, section in sections.items():
        full = f"{name}.{inner}" if name else inner
        yield f"\n## `{full}`\n{may_be_off[inner]}"
        yield from tables(full, section)


def values_of(config: object) -> dict[str, object]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}  # type: ignore[arg-type]


def table(cls: type, defaults: dict[str, object], leave_out: set[str]) -> str:
    lines = ["", "| Setting | Type | Default | Meaning |", "|---|---|---|---|"]
    for name, type_, comment in fields_of(cls):
        if name not in leave_out:
            if not comment:
                sys.exit(f"{cls.__name__}.{name} has no comment")
            cells = (f"`{name}`", f"`{type_}`", shown(defaults[name]), comment)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def fields_of(cls: type) -> Iterator[tuple[str, str, str]]:
    """Name, type and comment of each field, in the order of the source."""
    source = inspect.getsource(cls)
    comments, hints = comments_of(source), typing.get_type_hints(cls)
    (definition,) = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef))
    for node in definition.body:
        if isinstance(node, ast.AnnAssign):
            words = [comments[line] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in comments]
            name = ast.unparse(node.target)
            yield name, type_of(hints[name]), " ".join(words).replace("None", "null")


def type_of(hint: object) -> str:
    """As YAML has it."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(value or '""' for value in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) else re.sub(r"[\w.]+\.", "", str(hint)).replace("None", "null")


def comments_of(source: str) -> dict[int, str]:
    """By line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def shown(default: object) -> str:
    if default is dataclasses.MISSING:
        return "must be set"
    if default == DEMO_MODEL:
        return "the demo model"
    words = {None: "null", True: "true", False: "false", "": '""'}
    is_word = default is None or isinstance(default, bool) or default == ""
    return f"`{words[default] if is_word else default}`"  # type: ignore[index]


if __name__ == "__main__":
    main(sys.argv[1])
