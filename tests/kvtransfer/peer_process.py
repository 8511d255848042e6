"""A worker in a process of its own, to be killed: `peer_process.py ROLE`. Says who it is on stdout, then does what the
one line on stdin asks: take part in one transfer with the sender of that line, and hang in its middle or not."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict

import torch

from protos.types import PeerRef, Role
from tests.kvtransfer.workers import CONFIG, Worker, until


async def main(role: Role) -> None:
    worker = await Worker(role, role[0], CONFIG, seed=1 if role is Role.PREFILL else None).start()
    print(json.dumps(asdict(worker.me)), flush=True)
    order = json.loads(await asyncio.to_thread(sys.stdin.readline))
    peer = PeerRef(**{**order["peer"], "role": Role(order["peer"]["role"])})
    worker.agent.set_members(1, (worker.me, peer))
    transfer_id = bytes.fromhex(order["transfer_id"])
    if role is Role.DECODE:
        worker.grants(range(8))
        worker.agent.expect(transfer_id, peer, "r", 1)
        print("ready", flush=True)
        if order["hangs"]:
            worker.store.gate.clear()
            await until(lambda: worker.store.num_inside > 0)
            print("in the middle", flush=True)
        else:
            await worker.host.next("arrived", transfer_id)
            print("arrived", float(worker.store.pool[:8].double().sum()), flush=True)
    else:
        await worker.warm(peer.worker_id)
        worker.agent.open(transfer_id, peer, "r", 1, 8)
        worker.agent.send_blocks(transfer_id, 0, (0, 1, 2, 3))
        print("in the middle", flush=True)
    await asyncio.sleep(60)


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(main(Role(sys.argv[1])))
