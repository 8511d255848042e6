"""How soon a link notices that the process at its other end was killed, while a receive waits for bytes that never
come. Used by bench/transfer.py, and by a test."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection

import torch

from kvtransfer.config import TransferConfig, TransportName
from kvtransfer.transport import LinkFailed
from kvtransfer.transports import LocalFirst

NUM_BYTES = 64 << 20
TIMEOUT_S = 60.0


def noticed_s(transport: TransportName, num_resident: int = 0) -> float:
    """From the kill to the receive's end. num_resident: bytes that the killed process has beside what it needs."""
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    victim = spawn.Process(target=be_killed, args=(theirs, transport, num_resident), daemon=True)
    victim.start()
    links = LocalFirst(TransferConfig(transport=transport, chunk_timeout_s=TIMEOUT_S))
    assert pipe.poll(TIMEOUT_S), "the other process does not start"
    link = links.listen(pipe.recv(), lambda reason: None)
    try:
        pipe.send(link.offer)
        link.connect()
        link.post(0, torch.empty(NUM_BYTES, dtype=torch.uint8))
        time.sleep(0.05)  # so that the other end hangs as well
        killed_at = time.perf_counter()
        victim.kill()
        try:
            link.wait(0)
        except LinkFailed:
            return time.perf_counter() - killed_at
        raise AssertionError("bytes that nobody has sent")
    finally:
        victim.kill()
        victim.join()
        link.close()
        links.close()


def be_killed(pipe: Connection, transport: TransportName, num_resident: int) -> None:
    held = torch.ones(num_resident, dtype=torch.uint8)  # written, or the system would not have given it yet
    links = LocalFirst(TransferConfig(transport=transport))
    pipe.send(links.beacon)
    link = links.dial(pipe.recv(), lambda reason: None)
    link.allocate(NUM_BYTES)
    link.connect()
    time.sleep(TIMEOUT_S)
    assert held.numel() == num_resident
