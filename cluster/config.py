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

from cluster.tenants import FILE_VARIABLE, TOKENS_VARIABLE, parse_tokens, read_tenants_file
from engine.worker_config import EngineConfig, LeaseConfig
from kvtransfer.config import TransferConfig
from protos.types import Role
from router.autoscaler import AutoscalerConfig
from router.config import RouterConfig
from router.tenants import TenantConfig

NUM_STEP_BUDGETS = 2  # of tokens that are sent to a worker ahead of its work: one step computes, one is ready
DEMO_MODEL = str(Path(__file__).parent / "demo_model")

# Settings that router and workers share: set once, under `engine` or `lease`.
SHARED_SETTINGS = {
    "block_size": "engine",
    "hash_block_size": "engine",
    "heartbeat_interval_s": "lease",
    "lease_s": "lease",
}

# Alike on every worker: requests and KV go from one to the other, and the router speaks of one model.
COMMON_ENGINE_SETTINGS = (
    "model",
    "modelled",
    "dtype",
    "max_model_len",
    "block_size",
    "hash_block_size",
    "deterministic",
)
# Alike where workers are to compute the same bits.
DETERMINISTIC_SETTINGS = ("num_threads", "fused")
# Of decode workers, unless decode_engine says otherwise: what they generate is looked for at its home.
DECODE_ENGINE: Mapping[str, Any] = {"host_cache_bytes": 0}


@dataclasses.dataclass(frozen=True, slots=True)
class RayConfig:
    """address None starts a private Ray on loopback; anything else joins that cluster."""

    address: str | None = None  # of a Ray cluster to join; null: a private Ray on loopback
    join_as_node: bool = False  # start a Ray node without resources here: a Ray driver needs one on its own machine
    prefill_resource: str | None = None  # custom Ray resource of which each prefill worker takes 1
    decode_resource: str | None = None  # likewise for decode workers
    num_cpus_per_worker: float = 0.5  # of Ray's count; not a limit
    num_gpus_per_worker: float = 0.0  # likewise
    schedule_timeout_s: float = 20.0  # for nodes to join, and show their resources, in a cluster that is joined
    start_timeout_s: float = 60.0  # for one actor to be placed and to import what it needs
    load_timeout_s: float = 600.0  # for one worker to load the model

    def __post_init__(self) -> None:
        if self.join_as_node and self.address in (None, "auto"):
            raise ValueError(f"join_as_node needs ray.address as host:port of the cluster, not {self.address}")

    def resource_of(self, role: Role) -> str | None:
        return self.prefill_resource if role is Role.PREFILL else self.decode_resource


@dataclasses.dataclass(frozen=True, slots=True)
class ServeConfig:
    num_prefill: int = 1  # workers of this role; in mode colocated both counts are added up
    num_decode: int = 1  # workers of this role
    num_routers: int = 1  # each takes requests for all workers, on ports of its own; above 1, in processes of their own
    replace_dead_workers: bool = True  # with a new incarnation of the same name
    tenants_file: str | None = (
        None  # YAML file with who may call; None: TWINRING_TENANTS_FILE or TWINRING_TOKENS, if set
    )
    hub_cache: str | None = None  # folder of the Hugging Face cache; None: as HF_HUB_CACHE and HF_HOME say
    worker_bind_host: str = "127.0.0.1"  # of the workers' internal gRPC; auto: the IP of the Ray node they run on
    worker_port: int = 0  # fixed port of every worker's internal gRPC, one worker per machine; 0: any free one
    drain_timeout_s: float = 1.0  # how long running requests may go on after SIGTERM; a second signal ends them
    worker_drain_timeout_s: float = 30.0  # what one worker, or router, that leaves may still take for what it has
    engine: EngineConfig = dataclasses.field(default_factory=lambda: EngineConfig(model=DEMO_MODEL))
    prefill_engine: EngineConfig | None = None  # what prefill workers have other than in engine (docs/operations.md)
    decode_engine: EngineConfig | None = None  # likewise on decode workers
    lease: LeaseConfig = dataclasses.field(default_factory=LeaseConfig)
    transfer: TransferConfig = dataclasses.field(default_factory=TransferConfig)
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    ray: RayConfig = dataclasses.field(default_factory=RayConfig)
    autoscaler: AutoscalerConfig = dataclasses.field(default_factory=AutoscalerConfig)  # of the pools

    def __post_init__(self) -> None:
        if self.num_prefill < 1:
            raise ValueError(f"num_prefill must be at least 1, not {self.num_prefill}")
        if self.num_routers < 1:
            raise ValueError(f"num_routers must be at least 1, not {self.num_routers}")
        if self.num_decode < 0:
            raise ValueError(f"num_decode must not be negative, not {self.num_decode}")
        if not 0 <= self.worker_port <= 65535:
            raise ValueError(f"worker_port must be within 0 and 65535, not {self.worker_port}")
        if self.worker_port and self.ray.address is None and self.num_prefill + self.num_decode > 1:
            raise ValueError(
                f"worker_port {self.worker_port}: all workers of a private Ray are on this machine and cannot share it"
            )
        for name in ("drain_timeout_s", "worker_drain_timeout_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.autoscaler.enabled and self.router.mode == "colocated":
            raise ValueError("autoscaler.enabled is true, but in mode colocated nothing tells what a pool is short of")
        for name, section in SHARED_SETTINGS.items():
            ours, theirs = getattr(self.router, name), getattr(getattr(self, section), name)
            if ours != theirs:
                raise ValueError(f"router.{name} is {ours}, {section}.{name} is {theirs}: set {section}.{name} only")
        self._require_alike("prefill_engine", self.prefill_engine)
        self._require_alike("decode_engine", self.decode_engine)
        pulls = self.engine_of(Role.PREFILL).pulls
        if self.router.pull_s_per_token and pulls is None:
            raise ValueError(f"router.pull_s_per_token is {self.router.pull_s_per_token}, but engine.pulls is null")
        if self.router.returns and not (pulls and pulls.max_returns):
            raise ValueError("router.returns is on, but no worker takes any: set engine.pulls.max_returns above 0")

    def engine_of(self, role: Role) -> EngineConfig:
        if role is Role.PREFILL:
            return self.prefill_engine or self.engine
        return self.decode_engine or dataclasses.replace(self.engine, **DECODE_ENGINE)

    def _require_alike(self, section: str, engine: EngineConfig | None) -> None:
        if engine is None:
            return
        if self.router.mode == "colocated":
            raise ValueError(f"{section} is set, but in mode colocated every worker does both: set engine only")
        for name in (*COMMON_ENGINE_SETTINGS, *(DETERMINISTIC_SETTINGS if self.engine.deterministic else ())):
            ours, theirs = getattr(self.engine, name), getattr(engine, name)
            if ours != theirs:
                raise ValueError(f"{section}.{name} is {theirs}, engine.{name} is {ours}: set engine.{name} only")


def load_config(path: str | None = None, overrides: Mapping[str, Any] | None = None) -> ServeConfig:
    """The file's settings, then `overrides` (dotted names, e.g. "engine.model"), then defaults.

    ValueError names the setting and the value that is wrong."""
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"config {path}: {error}") from error
        if not isinstance(tree, dict):
            raise ValueError(f"config {path}: expected a mapping, got {type(tree).__name__}")
        tree = {name: value for name, value in tree.items() if value is not None}  # as if it were not there
    for name, value in (overrides or {}).items():
        _set(tree, name.split("."), value)
    _refuse_unknown(tree, ServeConfig, "")
    engine = tree.setdefault("engine", {})
    engine.setdefault("model", DEMO_MODEL)
    for section, base in (("prefill_engine", engine), ("decode_engine", {**engine, **DECODE_ENGINE})):
        if changes := tree.pop(section, None):
            tree[section] = _merged(base, changes)
    if "RAY_ADDRESS" in os.environ:
        tree.setdefault("ray", {}).setdefault("address", os.environ["RAY_ADDRESS"])
    router = tree.setdefault("router", {})
    router["tenants"] = _tenants(tree.get("tenants_file"))
    is_credit_set = router.get("dispatch_tokens") is not None
    if not is_credit_set:
        router.pop("dispatch_tokens", None)
    for name, section in SHARED_SETTINGS.items():
        if name in tree.get(section, {}):
            router.setdefault(name, tree[section][name])
    try:
        config = TypeAdapter(ServeConfig).validate_python(tree)
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, problem['loc'])) or 'config'}: {problem['msg']} (got {problem['input']!r})"
            for problem in error.errors()
        )
        raise ValueError("; ".join(problems)) from error
    return config if is_credit_set else _with_credit(config)


def _with_credit(config: ServeConfig) -> ServeConfig:
    num_tokens = NUM_STEP_BUDGETS * config.engine_of(Role.PREFILL).max_num_batched_tokens
    return dataclasses.replace(config, router=dataclasses.replace(config.router, dispatch_tokens=num_tokens))


def _tenants(path: object) -> tuple[TenantConfig, ...]:
    """Empty: nobody asked for any."""
    tokens = os.environ.get(TOKENS_VARIABLE)
    path = os.environ.get(FILE_VARIABLE) if path is None else path
    if path is not None and tokens is not None:
        raise ValueError(f"tenants come from tenants_file or from {TOKENS_VARIABLE}, not from both")
    if path is not None:
        return read_tenants_file(str(path))
    return () if tokens is None else parse_tokens(tokens)


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
    tree[path[-1]] = value


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """base with changes, setting by setting also in the sections below."""
    merged = dict(base)
    for name, value in changes.items():
        ours = merged.get(name)
        has_both = isinstance(ours, Mapping) and isinstance(value, Mapping)
        merged[name] = _merged(typing.cast(Mapping[str, Any], ours), value) if has_both else value
    return merged


def _refuse_unknown(tree: Mapping[str, Any], cls: type, prefix: str) -> None:
    hints = typing.get_type_hints(cls)
    for name, value in tree.items():
        if name not in hints:
            raise ValueError(f"unknown setting {prefix}{name}; known: {', '.join(sorted(hints))}")
        if hints[name] == tuple[TenantConfig, ...]:
            raise ValueError(f"{prefix}{name} cannot be set here: tenants_file names the file that has them")
        optional = typing.get_args(hints[name])
        hint = optional[0] if len(optional) == 2 and optional[1] is type(None) else hints[name]
        if dataclasses.is_dataclass(hint) and not (optional and value is None):
            if not isinstance(value, Mapping):
                raise ValueError(f"{prefix}{name} must be a mapping, got {value!r}")
            _refuse_unknown(value, typing.cast(type, hint), f"{prefix}{name}.")
