"""What a user can set: one frozen tree of dataclasses, read from YAML and overridden by flags. Everything below it gets
its settings handed in; environment variables are read here and nowhere else."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from engine.worker_config import EngineConfig, LeaseConfig
from kvtransfer.config import TransferConfig
from router.config import RouterConfig

DEMO_MODEL = str(Path(__file__).parent / "demo_model")

# Settings that router and workers share: set once, under `engine` or `lease`.
SHARED_SETTINGS = {
    "block_size": "engine",
    "hash_block_size": "engine",
    "heartbeat_interval_s": "lease",
    "lease_s": "lease",
}


@dataclasses.dataclass(frozen=True, slots=True)
class RayConfig:
    """address None starts a private Ray on loopback; anything else joins that cluster."""

    address: str | None = None
    num_cpus_per_worker: float = 0.5
    num_gpus_per_worker: float = 0.0
    schedule_timeout_s: float = 20.0  # for resources to appear in a joined cluster
    start_timeout_s: float = 60.0  # for one actor to be placed and to import what it needs
    load_timeout_s: float = 600.0


@dataclasses.dataclass(frozen=True, slots=True)
class ServeConfig:
    num_prefill: int = 1
    num_decode: int = 1
    replace_dead_workers: bool = True
    hub_cache: str | None = None  # folder of the Hugging Face cache; None: as HF_HUB_CACHE and HF_HOME say
    worker_bind_host: str = "127.0.0.1"
    engine: EngineConfig = dataclasses.field(default_factory=lambda: EngineConfig(model=DEMO_MODEL))
    lease: LeaseConfig = dataclasses.field(default_factory=LeaseConfig)
    transfer: TransferConfig = dataclasses.field(default_factory=TransferConfig)
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    ray: RayConfig = dataclasses.field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        if self.num_prefill < 1:
            raise ValueError(f"num_prefill must be at least 1, not {self.num_prefill}")
        if self.num_decode < 0:
            raise ValueError(f"num_decode must not be negative, not {self.num_decode}")
        for name, section in SHARED_SETTINGS.items():
            ours, theirs = getattr(self.router, name), getattr(getattr(self, section), name)
            if ours != theirs:
                raise ValueError(f"router.{name} is {ours}, {section}.{name} is {theirs}: set {section}.{name} only")


def load_config(path: str | None = None, overrides: Mapping[str, Any] | None = None) -> ServeConfig:
    """The file's settings, then `overrides` (dotted names, e.g. "engine.model"; None is skipped), then defaults.

    ValueError names the setting and the value that is wrong."""
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"config {path}: {error}") from error
        if not isinstance(tree, dict):
            raise ValueError(f"config {path}: expected a mapping, got {type(tree).__name__}")
    for name, value in (overrides or {}).items():
        if value is not None:
            _set(tree, name.split("."), value)
    tree.setdefault("engine", {}).setdefault("model", DEMO_MODEL)
    if "RAY_ADDRESS" in os.environ:
        tree.setdefault("ray", {}).setdefault("address", os.environ["RAY_ADDRESS"])
    _refuse_unknown(tree, ServeConfig, "")
    for name, section in SHARED_SETTINGS.items():
        if name in tree.get(section, {}):
            tree.setdefault("router", {}).setdefault(name, tree[section][name])
    try:
        return TypeAdapter(ServeConfig).validate_python(tree)
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, problem['loc'])) or 'config'}: {problem['msg']} (got {problem['input']!r})"
            for problem in error.errors()
        )
        raise ValueError("; ".join(problems)) from error


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _refuse_unknown(tree: Mapping[str, Any], cls: type, prefix: str) -> None:
    hints = typing.get_type_hints(cls)
    for name, value in tree.items():
        if name not in hints:
            raise ValueError(f"unknown setting {prefix}{name}; known: {', '.join(sorted(hints))}")
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping):
            _refuse_unknown(value, typing.cast(type, hints[name]), f"{prefix}{name}.")
