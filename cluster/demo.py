"""The first minute with Twinring: starts a local cluster on the demo model, sends prompts as any gRPC client would, and
shows for each one where it ran, why, and what it cost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

from cluster import show
from cluster.client import Client
from cluster.client_types import Completion, Sampling
from cluster.run_state import running_servers

LICENCE = (
    "Everyone is permitted to copy and distribute verbatim copies of this license document, but changing it is not "
    "allowed. "
)
PROMPTS = [
    ("first", "The licenses for most software are designed to take away your freedom to share and change it. "),
    ("preamble", "This program is distributed in the hope that it will be useful, but WITHOUT ANY WARRANTY; "),
    ("long", LICENCE * 9),
    ("first, again", "The licenses for most software are designed to take away your freedom to share and change it. "),
    ("long + a turn", LICENCE * 9 + "The precise terms and conditions for copying, distribution and "),
]
SAMPLING = Sampling(max_tokens=96, temperature=0.7, seed=7)
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0


def main() -> int:
    console = Console(highlight=False)
    started_at = time.monotonic()
    console.print("[bold]Twinring demo[/bold]: 2 prefill and 2 decode workers on this machine, bundled demo model")
    pools = ["--prefill", "2", "--decode", "2"]
    listen = ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    server = subprocess.Popen([sys.executable, "-m", "cluster.cli", "serve", *pools, *listen])
    try:
        with Client(wait_for(server)) as client:
            rows = [ask(console, client, name, prompt, started_at) for name, prompt in PROMPTS]
        console.print(account_table(rows))
        for name, complete in rows:
            placement = complete.placement
            console.print(
                f"[bold]{name}[/bold]: {show.mode_of(placement)}; {placement.prefill_reason}; {placement.decode_reason}"
            )
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(STOP_TIMEOUT_S)
    return 0


def wait_for(server: subprocess.Popen[bytes]) -> str:
    """The address that the server announces once it can serve."""
    give_up_at = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up_at:
        for state in running_servers():
            if state.pid == server.pid:
                return state.address
        if server.poll() is not None:
            raise SystemExit(f"the server ended with exit status {server.returncode}")
        time.sleep(0.1)
    raise SystemExit(f"the server was not ready after {START_TIMEOUT_S:g} s")


def ask(console: Console, client: Client, name: str, prompt: str, started_at: float) -> tuple[str, Completion]:
    shown = prompt if len(prompt) < 200 else f"{prompt[:80]} [...{len(prompt) - 160} characters...] {prompt[-80:]}"
    console.print(
        f"\n[bold]{name}[/bold] [dim]({time.monotonic() - started_at:.1f} s)[/dim]\n{shown}", end="", markup=True
    )
    for chunk in client.stream(prompt, SAMPLING, timeout_s=60):
        console.print(chunk.text, end="", style="cyan", markup=False, soft_wrap=True)
        if chunk.completion is not None:
            console.print()
            return name, chunk.completion
    raise SystemExit(f"the stream of {name!r} ended without an account")


def account_table(rows: list[tuple[str, Completion]]) -> Table:
    """Times in milliseconds; fits 80 columns."""
    table = Table("prompt", "prefill", "decode", title="What happened")
    for column in ("TTFT", "TPOT", "cached", "KV KiB", "KV ms"):
        table.add_column(column, justify="right")
    for name, complete in rows:
        placement = complete.placement
        table.add_row(
            name,
            placement.prefill_worker,
            placement.decode_worker,
            f"{placement.ttft_s * 1e3:.1f}",
            f"{placement.tpot_s * 1e3:.2f}",
            f"{complete.cached_tokens}/{complete.prompt_tokens}",
            f"{placement.kv_bytes_moved / 1024:,.0f}",
            f"{placement.transfer_s * 1e3:.1f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
