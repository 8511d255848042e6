"""The prefill actor: a worker that computes prompts and hands their KV on. Its agent dials every decode worker, so that
a link is warm before the first request needs it."""

from __future__ import annotations

from engine.worker import Worker
from engine.worker_config import WorkerSpec
from kvtransfer.agent import TransferAgent
from kvtransfer.config import TransferConfig
from kvtransfer.handshake import peer_secret
from protos.types import Role


class PrefillWorker(Worker):
    """Made a Ray actor by cluster/actors.py; usable without Ray."""

    def __init__(self, spec: WorkerSpec, transfer: TransferConfig) -> None:
        assert spec.role is Role.PREFILL
        secret = peer_secret(spec.hash_key)
        super().__init__(spec, lambda me, store, host: TransferAgent(me, store, host, transfer, secret))
