"""The pools that settings ask for: who is in them at first, and what they allow later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cluster.config import ServeConfig
from protos.types import Role
from router.pools import COLOCATED, DISAGGREGATED, Pools


def pools_of(config: ServeConfig) -> Pools:
    roles = COLOCATED if config.router.mode == "colocated" else DISAGGREGATED
    return Pools(roles, worker_slots(config), _may_turn(config), lambda sizes: _check(config, sizes))


def worker_slots(config: ServeConfig) -> list[tuple[str, Role]]:
    if config.router.mode == "colocated":
        return [(f"worker-{i}", Role.PREFILL) for i in range(config.num_prefill + config.num_decode)]
    return [(f"prefill-{i}", Role.PREFILL) for i in range(config.num_prefill)] + [
        (f"decode-{i}", Role.DECODE) for i in range(config.num_decode)
    ]


def _may_turn(config: ServeConfig) -> bool:
    """Where both roles take the same of Ray, and have the same engine; host memory is not handed on."""
    ray, engine = config.ray, config.engine_of(Role.PREFILL)
    is_alike = ray.prefill_resource == ray.decode_resource and engine == config.engine_of(Role.DECODE)
    return is_alike and not engine.host_cache_bytes


def _check(config: ServeConfig, wanted: Mapping[str, int]) -> None:
    if wanted.get("worker") == 0:
        raise ValueError("pool worker must have at least 1 worker, not 0")
    replace(  # refuses what the settings would refuse
        config, num_prefill=wanted.get("prefill", wanted.get("worker", 0)), num_decode=wanted.get("decode", 0)
    )
