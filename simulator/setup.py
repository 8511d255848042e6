"""What is simulated: hardware, numbers of workers, the settings of the shipping classes, and what happens to workers in
mid-run. Refuses what could never work; decides nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from engine.config import HostTierConfig, SchedulerConfig
from kvtransfer.config import TransferConfig
from protos.cost_model import Hardware
from protos.types import Role
from router.autoscaler import AutoscalerConfig
from router.config import RouterConfig

BLOCK_TOKENS = 512  # of a block of the usual traces: a KV block and a hash block here, too
NO_LIMIT = 1 << 30


def default_router() -> RouterConfig:
    """Takes every request: a simulation shows queues instead of refusing them."""
    return RouterConfig(
        hash_block_size=BLOCK_TOKENS,
        block_size=BLOCK_TOKENS,
        max_in_flight=NO_LIMIT,
        max_requests_per_worker=NO_LIMIT,
        refuses_early=False,
        tpot_slo_s=0.05,
    )


def default_scheduler() -> SchedulerConfig:
    return SchedulerConfig(
        max_model_len=NO_LIMIT,
        max_num_batched_tokens=8192,
        max_num_seqs=256,
        block_size=BLOCK_TOKENS,
        hash_block_size=BLOCK_TOKENS,
    )


def default_transfer() -> TransferConfig:
    """Chunks as large as blocks of 512 tokens ask for, with time to match on links that are shared."""
    return TransferConfig(chunk_nbytes=256 << 20, chunk_timeout_s=10.0)


class ChangeKind(StrEnum):
    JOIN = "join"
    LEAVE = "leave"  # told to the router at once
    DRAIN = "drain"  # likewise; it finishes what it has first
    FAIL = "fail"  # silent: the router learns of it when the lease runs out, peers when their streams fall silent


@dataclass(frozen=True, slots=True)
class Change:
    """One worker's coming or going. Workers of the start are prefill-0.., decode-0..; one that joins by a name that was
    used before is a new life of it."""

    at_s: float
    kind: ChangeKind
    worker_id: str
    role: Role = Role.PREFILL  # of one that joins


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """SLOs, policy, queue order and ring seed are the router's settings. Without decode workers the cluster is either
    colocated, by router.mode, or prefills only: every request then ends with its first token."""

    hardware: Hardware
    num_prefill: int = 8
    num_decode: int = 0
    router: RouterConfig = field(default_factory=default_router)
    scheduler: SchedulerConfig = field(default_factory=default_scheduler)
    transfer: TransferConfig = field(default_factory=default_transfer)
    num_host_tokens: int = 0  # KV in host memory, of each worker that prefills; 0: what the device evicts is gone
    host_link_nbytes_per_s: float = 50e9  # of each worker, each way: PCIe 5.0 x16 has 63e9, headers and pauses included
    link_nbytes_per_s: float = 25e9  # of each worker, each way: 200 Gb/s
    message_s: float = 0.0005  # one way of any message between two processes
    gather_s_per_byte: float = 0.0  # and checksum, at the source
    scatter_s_per_byte: float = 0.0  # and verification, at the destination
    stats_interval_s: float = 0.25  # how often workers report their stats, where they have changed
    tick_s: float = 0.25  # how often deadlines are looked at
    load_interval_s: float = 10.0  # between samples of the load
    changes: tuple[Change, ...] = ()
    autoscaler: AutoscalerConfig = field(default_factory=AutoscalerConfig)  # enabled: pools change by themselves
    worker_start_s: float = 60.0  # of one that the autoscaler starts: process, model, until it serves
    turn_s: float = 1.0  # of one that changes its role, after it has drained
    worker_drain_timeout_s: float = 30.0  # what one that the autoscaler lets go may still take for what it has
    num_warmup: int = 0  # first requests that the summary leaves out
    fast_forwards: bool = True  # several decode tokens in one step, with the same results; off to check that

    def __post_init__(self) -> None:
        for name in (
            *("num_prefill", "link_nbytes_per_s", "host_link_nbytes_per_s"),
            *("stats_interval_s", "tick_s", "load_interval_s"),
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in (
            *("num_decode", "num_host_tokens", "message_s", "gather_s_per_byte", "scatter_s_per_byte"),
            *("num_warmup", "worker_start_s", "turn_s", "worker_drain_timeout_s"),
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("block_size", "hash_block_size"):
            if getattr(self.router, name) != getattr(self.scheduler, name):
                raise ValueError(
                    f"{name} must be the same for router and scheduler, got {getattr(self.router, name)} "
                    f"and {getattr(self.scheduler, name)}"
                )
        if self.is_colocated and self.num_decode:
            raise ValueError(f"num_decode must be 0 in colocated mode, got {self.num_decode}")
        if self.scheduler.host is not None:
            raise ValueError(
                f"host memory is num_host_tokens here, scheduler.host must be None, got {self.scheduler.host}"
            )
        if 0 < self.num_host_tokens < self.scheduler.block_size:
            raise ValueError(f"num_host_tokens {self.num_host_tokens} make no block of {self.scheduler.block_size}")
        if self.autoscaler.enabled and not self.num_decode:
            raise ValueError("autoscaler needs workers that prefill and others that decode, like 4p4d")
        if self.autoscaler.enabled and self.changes:
            kind = self.changes[0].kind.value
            raise ValueError(f"autoscaler decides who comes and goes: {kind} cannot be given beside it")
        if self.num_blocks < 1:
            raise ValueError(f"{self.hardware.num_kv_tokens} KV tokens make no block of {self.scheduler.block_size}")

    @property
    def is_colocated(self) -> bool:
        return self.router.mode == "colocated"

    @property
    def is_prefill_only(self) -> bool:
        return self.num_decode == 0 and not self.is_colocated

    def num_of(self, role: Role) -> int:
        """Workers at the start."""
        return self.num_prefill if role is Role.PREFILL else self.num_decode

    def lease_s(self, change: Change) -> float:
        """How long the router takes a worker for alive that is not."""
        return self.router.lease_s if change.kind is ChangeKind.FAIL else 0.0

    @property
    def num_blocks(self) -> int:
        """KV blocks of one worker."""
        return self.hardware.num_kv_tokens // self.scheduler.block_size

    def scheduler_of(self, role: Role) -> SchedulerConfig:
        """Of a worker. What a decode worker has generated is looked for at its home, so it needs no second tier."""
        if not self.num_host_tokens or role is Role.DECODE:
            return self.scheduler
        host = HostTierConfig(
            num_blocks=self.num_host_tokens // self.scheduler.block_size,
            s_per_token=self.hardware.kv_nbytes_per_token / self.host_link_nbytes_per_s,
            max_saving_blocks=-(-self.scheduler.max_num_batched_tokens // self.scheduler.block_size),  # of a step
        )
        return replace(self.scheduler, host=host)

    @property
    def block_nbytes(self) -> int:
        return self.hardware.kv_nbytes_per_token * self.scheduler.block_size
