"""A router with as many workers as asked for and a past: what the page at /ui can be shown without any cluster."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from protos.types import ServingMode
from router.account import RequestAccount
from router.config import RouterConfig
from router.published_view import KnownWorker
from router.recent_requests import EndedRequest, RecentRequests
from router.router import Router
from router.status import ClusterStatus, StatusEvent
from router.ui_state import Json, Serving, ui_state
from tests.router.values import make_router, peer, reported, stats

CONFIG = RouterConfig()
NOW = 1_800_000_000.0
SERVING = Serving(model="demo-model", version="0.1.0", started_at_unix_s=NOW - 4000.0)
DOWN = ("prefill-3",)  # where there are that many


def account(prefill_worker: str, decode_worker: str, **fields: object) -> RequestAccount:
    values: dict[str, object] = {
        "mode": ServingMode.LOCAL if prefill_worker == decode_worker else ServingMode.DISAGGREGATED,
        "mode_reason": "",
        "num_attempts": 1,
        "num_predicted_cached_tokens": 0,
        "num_predicted_pulled_tokens": 0,
        "num_cached_tokens": 64,
        "num_pulled_tokens": 0,
        "num_failed_pulls": 0,
        "num_held_tokens": 0,
        "num_kv_bytes": 400_000,
        "transfer_s": 0.03,
        "transfer_exposed_s": 0.004,
        "num_preemptions": 0,
        "num_moves": 0,
        "num_migrations": 0,
        "migration_pause_s": 0.0,
        "queued_s": 0.01,
        "pull_s": 0.0,
        "prefill_s": 0.06,
        "ttft_s": 0.08,
        "tpot_s": 0.02,
        "e2e_s": 0.4,
    }
    return RequestAccount(prefill_worker, "home, warm", decode_worker, "most room", **{**values, **fields})  # type: ignore[arg-type]


def ended(request_id: str, at: float = NOW, ran: RequestAccount | None = None, outcome: str = "length") -> EndedRequest:
    return EndedRequest(request_id, at, outcome, 200, 16, ran)


@dataclass
class BusyCluster:
    num_prefill: int
    num_decode: int
    luck: random.Random = field(default_factory=lambda: random.Random(7))

    def __post_init__(self) -> None:
        self.prefill = [f"prefill-{index}" for index in range(self.num_prefill)]
        self.decode = [f"decode-{index}" for index in range(self.num_decode)]
        down = {*DOWN} if self.num_prefill > 3 else set()
        live = [worker_id for worker_id in self.prefill + self.decode if worker_id not in down]
        self.router: Router = make_router(*live, config=CONFIG)
        self.status = ClusterStatus(CONFIG, self.router.view)
        self.recent = RecentRequests()
        self.status.set_expected(self.num_prefill, self.num_decode)
        for worker_id in self.prefill + self.decode:
            self.status.note(KnownWorker(peer(worker_id), 0, is_up=True))
        for worker_id in down:
            self.status.note_down(peer(worker_id))
        self.status.view_version = len(live)
        self.status.events.append(StatusEvent(NOW - 3990.0, "ready"))
        self.status.events += [StatusEvent(NOW - 100.0, f"lost {worker_id}: no frame for 1.5 s") for worker_id in down]
        for number in range(150):
            self.pass_time(NOW - 50.0 + number / 4)

    def pass_time(self, now: float) -> None:
        """Another load on every worker, and one more request that has ended."""
        luck = self.luck
        for view in self.router.view.workers.values():
            held, leased, cached = luck.randint(0, 600), luck.randint(0, 60), luck.randint(0, 1200)
            blocks = {"num_held_blocks": held, "num_leased_blocks": leased, "num_cached_blocks": cached}
            running, waiting = luck.randint(0, 12), luck.choice((0, 0, 0, 3))
            load = stats(num_blocks=2048, num_free_blocks=2048 - held - leased - cached, **blocks, num_running=running)
            load_fields = {name: getattr(load, name) for name in load.__dataclass_fields__}
            report = stats(
                **{
                    **load_fields,
                    "num_waiting": waiting,
                    "prefill_s_per_token": 0.0004,
                    "warm_links": tuple(self.decode),
                }
            )
            self.router.on(reported(view.worker_id, stats=report), 0.0)
        # Some prefixes are asked for more than others.
        prefill = self.prefill[int(luck.betavariate(1, 3) * self.num_prefill)]
        decode = prefill if luck.random() < 0.1 else luck.choice(self.decode or self.prefill)
        ttft_s, tpot_s = luck.lognormvariate(-1.5, 0.9), luck.lognormvariate(-3.6, 0.6)
        ran = account(prefill, decode, ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=ttft_s + 15 * tpot_s)
        self.router.statistics.num_finished += 1
        self.recent.note(ended(f"{luck.getrandbits(128):032x}", now, ran))

    def state(self, now: float = NOW, known_rings: str = "") -> Json:
        return ui_state(CONFIG, self.router, self.status, self.recent, SERVING, now, known_rings)
