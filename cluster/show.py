"""How the command line shows a cluster, a request's account and progress. Text only."""

from __future__ import annotations

import time

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.client_types import Completion, Placement, Route, RouteCandidate, Status


class ProgressLines:
    """One line per change of state: readable on a terminal, in a log and in CI alike."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started_at = time.monotonic()
        self._shown: dict[str, str] = {}

    def __call__(self, who: str, what: str) -> None:
        if self._shown.get(who) != what:
            self._shown[who] = what
            self._console.print(
                f"[dim]{time.monotonic() - self._started_at:6.1f} s[/dim]  {who:<12} {what}", highlight=False
            )


def account_line(complete: Completion) -> str:
    """What happened to one request, in one line."""
    placement = complete.placement
    moved = f"{placement.kv_bytes_moved / 1024:,.0f} KiB in {placement.transfer_s * 1e3:.1f} ms"
    pulled = f" ({placement.pulled_tokens} pulled)" if placement.pulled_tokens else ""
    workers = (
        f"{placement.prefill_worker} -> {placement.decode_worker}"
        if placement.decode_worker and placement.decode_worker != placement.prefill_worker
        else placement.prefill_worker
    )
    return (
        f"{complete.completion_tokens} tokens, "
        f"TTFT {placement.ttft_s * 1e3:.1f} ms, TPOT {placement.tpot_s * 1e3:.2f} ms, "
        f"cached {complete.cached_tokens}/{complete.prompt_tokens}{pulled}, {mode_of(placement)}, "
        f"{workers}, KV moved {moved}"
    )


def mode_of(placement: Placement) -> str:
    return placement.mode.value if placement.mode else "no worker had it"


def route_tables(route: Route) -> list[Table]:
    """The chosen candidates are marked."""
    return [
        _candidates("prefill", route.prefill_candidates, route.prefill_worker),
        _candidates("decode", route.decode_candidates, route.decode_worker),
    ]


def _candidates(title: str, candidates: tuple[RouteCandidate, ...], chosen: str) -> Table:
    table = Table("", title, "home", "cached", "pulled", "queued", "pending", "TTFT s", "free blocks")
    for one in candidates:
        table.add_row(
            "->" if one.worker_id == chosen else "",
            one.worker_id,
            "yes" if one.is_home else "",
            str(one.num_cached_tokens),
            str(one.num_pulled_tokens),
            str(one.num_queued),
            str(one.num_pending_tokens),
            f"{one.ttft_estimate_s:.3f}",
            str(one.num_free_blocks),
        )
    return table


def router_lines(address: str, status: Status) -> str:
    return (
        f"{status.router_id} at {address}: {status.message}; {status.mode}, model {status.model}, "
        f"version {status.version}\n{status.num_requests_in_flight} requests in flight, "
        f"{status.num_requests_finished} finished, {status.num_failovers} failovers; view {status.view_version}"
    )


def status_tables(status: Status) -> list[Table]:
    """Fit 80 columns. q: queued at the router. Blocks are KV blocks; roles and addresses are in --json."""
    counts = ("blocks", "free", "cached", "held", "leased")
    workers = Table("worker", "state", "q/run/wait", *counts, "ledger", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for load in status.workers:
        numbers = (
            load.num_blocks,
            load.num_free_blocks,
            load.num_cached_blocks,
            load.num_held_blocks,
            load.num_leased_blocks,
        )
        requests = f"{load.num_queued}/{load.num_running}/{load.num_waiting}"
        ledger = "ok" if load.ledger_balanced else "LEAK"
        workers.add_row(load.worker_id, load.state, requests, *map(str, numbers), ledger)
    links = Table("KV from", "over", "to", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for load in status.workers:
        for transport in sorted({link.transport for link in load.links}):
            there = ", ".join(link.worker_id for link in load.links if link.transport == transport)
            links.add_row(load.worker_id, transport, there)
    events = Table("at", "event")
    for event in status.events:
        events.add_row(time.strftime("%H:%M:%S", time.localtime(event.at_unix_s)), event.message)
    return [workers, links, events]
