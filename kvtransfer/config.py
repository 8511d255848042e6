"""The knobs of moving KV, and their defaults. Knows no other part of the system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Checksum = Literal["xxh3_64", "sum64", "none"]
TransportName = Literal["auto", "gloo", "shared_memory", "nccl", "cuda_ipc"]
_ON_DEVICE = ("nccl", "cuda_ipc")


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """Two workers can move KV only where chunk_nbytes and checksum agree; every other knob is each worker's own."""

    chunk_nbytes: int = 4 << 20  # one wire operation; a block larger than this is a chunk of its own
    num_staging_chunks: int = 4  # at the source of a link: how many are gathered ahead
    chunk_timeout_s: float = 1.0  # one chunk on the wire
    offer_timeout_s: float = 5.0  # for the other worker's engine to answer an offer or an ask
    expect_timeout_s: float = 2.0  # how long an offer may precede the router's announcement
    transfer_timeout_s: float = 60.0  # an open transfer without any event
    connect_timeout_s: float = 5.0  # to dial another worker
    ping_interval_s: float = 0.5  # on a control stream that has nothing else to carry
    silence_timeout_s: float = 1.5  # a control stream that is silent for longer has lost its peer
    max_lazy_links: int = (
        8  # of one worker, made for migrations, pulls and returns; the one unused for longest makes way
    )
    checksum: Checksum = "xxh3_64"  # of each chunk
    bind_host: str = "127.0.0.1"  # not encrypted: a private interface; auto: the Ray node's IP
    transport: TransportName = "auto"  # shared_memory: on one machine; auto: that, else gloo; docs/gpu.md: the others
    nccl_max_ctas: int = 4  # of each NCCL link; more are faster and take more of the GPU
    failpoint: Literal["", "flip_received_bytes"] = ""  # tests only

    def __post_init__(self) -> None:
        if self.checksum not in ("xxh3_64", "sum64", "none"):
            raise ValueError(f"checksum must be xxh3_64, sum64 or none, not {self.checksum!r}")
        if self.transport not in (names := get_args(TransportName)):
            raise ValueError(f"transport must be one of {', '.join(names)}, not {self.transport!r}")
        if self.transport in _ON_DEVICE and self.checksum == "xxh3_64":
            raise ValueError(f"checksum must be sum64 or none with transport {self.transport}, not {self.checksum!r}")
        if self.failpoint not in ("", "flip_received_bytes"):
            raise ValueError(f"failpoint must be empty or flip_received_bytes, not {self.failpoint!r}")
        for name in ("chunk_nbytes", "num_staging_chunks", "max_lazy_links", "nccl_max_ctas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in self.__dataclass_fields__:
            if name.endswith("_s") and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")

    @property
    def answer_timeout_s(self) -> float:
        """How long the peer may take to answer what only it can do: one chunk on the wire, one verified and written."""
        return 2 * self.chunk_timeout_s

    @property
    def num_receives(self) -> int:
        """That a link's destination has posted and is not done with: one that comes or is being written, and one behind
        it, so that neither end waits. A third would stand before whatever is announced next: once given, the numbers of
        a link are not taken back."""
        return min(self.num_staging_chunks, 2)

    def num_chunk_blocks(self, block_nbytes: int) -> int:
        return max(1, self.chunk_nbytes // block_nbytes)
