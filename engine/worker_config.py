"""What a worker is told when it is made: its name, its model, its memory, its timers."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.config import PullConfig
from protos.cost_model import HARDWARE, Hardware
from protos.types import Role

CPU_KV_NBYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How one worker computes. Sizes in tokens unless the name says bytes."""

    model: str  # folder of a checkpoint, or a Hugging Face id that is in the local cache
    dtype: str = "float32"  # of weights, activations and KV
    device: str = "cpu"  # as PyTorch names it
    num_threads: int = 1  # of PyTorch, in each worker
    max_model_len: int | None = None  # None: what the model's config says
    max_num_batched_tokens: int = 512  # that one step computes, over all requests; longer prompts take several
    max_num_seqs: int = 64  # requests that run at a time on one worker
    block_size: int = 64  # of KV, a multiple of hash_block_size
    hash_block_size: int = 64  # that one link of a prompt's hash chain covers; what prefixes are matched by
    kv_cache_bytes: int | None = None  # of each worker; null: 256 MiB, on a GPU all that gpu_memory_utilization leaves
    num_blocks: int | None = None  # overrides kv_cache_bytes and what modelled hardware holds
    host_cache_bytes: int = 0  # host memory for KV that was evicted; decode workers: by decode_engine only; 0: none
    enable_prefix_caching: bool = True  # keep blocks of ended requests, and find them by their hashes
    max_migration_tail_blocks: int = 1  # a decode that migrates stops when so many of its KV blocks are left to send
    gpu_memory_utilization: float = 0.9  # share of the whole GPU that one worker may take
    gpu_reserved_bytes: int = 1 << 30  # of that, for recorded graphs and for links, which come after the KV
    paged_kernels: bool = True  # on a GPU: attention by kernels in Triton, where that is installed; else by PyTorch
    cuda_graphs: bool = True  # with paged_kernels: steps that only decode are recorded at start, and replayed
    fused: bool = True  # faster layers in place of transformers' own
    deterministic: bool = False  # a request gets the same bits whatever runs beside it (docs/determinism.md)
    fused_kernels: bool = False  # with fused and paged_kernels: more of a layer by kernels in Triton
    pulls: PullConfig | None = field(default_factory=PullConfig)  # prefixes that others hold; null: no pulls
    modelled: str | Hardware | None = None  # steps compute nothing and take as long as on this (docs/simulator.md)

    def __post_init__(self) -> None:
        for name in (
            "num_threads",
            "max_num_batched_tokens",
            "max_num_seqs",
            "block_size",
            "hash_block_size",
            "max_migration_tail_blocks",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.block_size % self.hash_block_size:
            raise ValueError(
                f"block_size {self.block_size} is not a multiple of hash_block_size {self.hash_block_size}"
            )
        if isinstance(self.modelled, str) and self.modelled not in HARDWARE:
            rows = ", ".join(HARDWARE)
            raise ValueError(f"modelled must be one of {rows}, or costs and memory, not {self.modelled!r}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be above 0 and at most 1, not {self.gpu_memory_utilization}")
        if self.gpu_reserved_bytes < 0:
            raise ValueError(f"gpu_reserved_bytes must not be negative, got {self.gpu_reserved_bytes}")
        if self.deterministic and self.device != "cpu":
            raise ValueError(f"deterministic needs device cpu, not {self.device!r}")
        if self.deterministic and self.num_threads & (self.num_threads - 1):  # so that no thread ends amid a vector
            raise ValueError(f"deterministic needs num_threads 1, 2, 4, 8 and so on, not {self.num_threads}")
        if self.host_cache_bytes < 0:
            raise ValueError(f"host_cache_bytes must not be negative, got {self.host_cache_bytes}")
        if self.host_cache_bytes and not self.enable_prefix_caching:
            raise ValueError("host_cache_bytes needs the prefix cache, and enable_prefix_caching is False")
        if self.fixed_num_blocks is not None and self.fixed_num_blocks < 1:
            raise ValueError("num_blocks, or num_kv_tokens of what is modelled, must make at least one block")

    @property
    def modelled_hardware(self) -> Hardware | None:
        """None: workers run the model."""
        return HARDWARE[self.modelled] if isinstance(self.modelled, str) else self.modelled

    @property
    def fixed_num_blocks(self) -> int | None:
        """KV blocks of one worker; None: as many as kv_nbytes holds."""
        hardware = self.modelled_hardware
        if self.num_blocks is not None or hardware is None:
            return self.num_blocks
        return hardware.num_kv_tokens // self.block_size

    @property
    def is_on_gpu(self) -> bool:
        return self.device.partition(":")[0] == "cuda"

    @property
    def kv_nbytes(self) -> int | None:
        """None: what is free on the GPU decides, once the model is there."""
        if self.kv_cache_bytes is None and self.is_on_gpu and self.modelled is None:
            return None
        return CPU_KV_NBYTES if self.kv_cache_bytes is None else self.kv_cache_bytes


@dataclass(frozen=True, slots=True)
class LeaseConfig:
    """A worker that has heard from no router for lease_s fences itself; one whose step lasts longer than max_step_s no
    longer vouches for itself."""

    heartbeat_interval_s: float = 0.25  # between two frames of a worker to the router, and back
    lease_s: float = 1.5  # of silence, after which router and worker give each other up
    max_step_s: float = 60.0  # of one engine step, after which its worker counts as hung


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    worker_id: str
    incarnation: str
    role: Role
    engine: EngineConfig
    hash_key: bytes = field(repr=False)
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    bind_host: str = "127.0.0.1"
    bind_port: int = 0  # of the internal gRPC server; 0: any free one
