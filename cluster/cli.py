"""The `twinring` command. Parses, calls, prints; decides nothing."""

from __future__ import annotations

import json as json_format
import os
import secrets
import signal
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console

from bench.load.command import bench_app
from cluster import show, wait_for
from cluster.client import Client
from cluster.client_types import Access, CallFailed, Message, Prompt, Sampling, Status
from cluster.config import load_config
from cluster.doors import addresses_of
from cluster.fit import fit
from cluster.run_state import is_alive, running_servers
from cluster.tenants import hash_of
from simulator.command import simulate

app = typer.Typer(
    help="Serves large language models with prefill and decode in separate pools.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
app.command()(simulate)
app.command()(fit)
console = Console(stderr=True)

STOP_TIMEOUT_S = 20.0
DRAIN_TIMEOUT_S = 30.0  # what the servers allow where they are not told, as ServeConfig has it
START_TIMEOUT_S = 120.0  # for a new worker to load its model, before `drain` and `scale` stop waiting for it
TOKEN_NBYTES = 32

Chat = Annotated[bool, typer.Option("--chat", help="Send it as a user's message, by the model's chat template.")]
Token = Annotated[str | None, typer.Option(envvar="TWINRING_TOKEN", help="A tenant's token.", show_envvar=True)]
Ca = Annotated[
    str | None, typer.Option(envvar="TWINRING_CA", help="PEM file to trust: the server has TLS.", show_envvar=True)
]
Address = Annotated[
    str | None,
    typer.Option(help="host:port of a router, or several with commas between; default: those running on this machine."),
]


def fail(message: str) -> typer.Exit:
    console.print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    return typer.Exit(1)


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"twinring {version('twinring')}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    model: Annotated[str | None, typer.Option(help="Folder, or Hugging Face id. Default: the demo model.")] = None,
    prefill: Annotated[int | None, typer.Option(help="Number of prefill workers.")] = None,
    decode: Annotated[int | None, typer.Option(help="Number of decode workers.")] = None,
    routers: Annotated[int | None, typer.Option(help="Number of routers, each with ports of its own.")] = None,
    mode: Annotated[str | None, typer.Option(help="disaggregated or colocated.")] = None,
    listen: Annotated[str | None, typer.Option(help="host:port for gRPC; port 0 takes a free one.")] = None,
    http: Annotated[str | None, typer.Option(help="host:port for the OpenAI API and /ui; empty turns it off.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join (default: RAY_ADDRESS, else a private one).")
    ] = None,
    config: Annotated[str | None, typer.Option(help="YAML file with settings.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="One setting, e.g. engine.num_blocks=512.")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
) -> None:
    """Start a cluster and serve until Ctrl-C."""
    from cluster.logs import configure_logging

    flags = {
        "engine.model": model,
        "num_prefill": prefill,
        "num_decode": decode,
        "num_routers": routers,
        "router.mode": mode,
        "router.listen": listen,
        "router.http_listen": http,
        "ray.address": address,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    overrides = {**given, **dict(parse_setting(setting) for setting in set_ or [])}
    configure_logging(log_level)
    try:
        settings = load_config(config, overrides)
        from cluster import serve as serving

        serving.run(settings, show.ProgressLines(console), log_level)
    except (ValueError, OSError, TimeoutError) as error:
        raise fail(str(error)) from error


def parse_setting(setting: str) -> tuple[str, object]:
    import yaml

    name, equals, value = setting.partition("=")
    if not equals:
        raise typer.BadParameter(f"{setting!r} is not name=value")
    return name, yaml.safe_load(value)


@app.command()
def generate(
    prompt: str,
    address: Address = None,
    token: Token = None,
    ca: Ca = None,
    chat: Chat = False,
    max_tokens: Annotated[int | None, typer.Option()] = 128,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be repeated.")] = None,
) -> None:
    """Stream a completion; the request's account goes to standard error."""
    sampling = Sampling(max_tokens, temperature, top_p, top_k, seed, tuple(stop or ()))
    with client_of(address, token, ca) as client:
        try:
            for chunk in client.stream(as_prompt(prompt, chat), sampling):
                print(chunk.text, end="", flush=True)
                if chunk.completion is not None:
                    print()
                    console.print(show.account_line(chunk.completion), style="dim", highlight=False, markup=False)
        except CallFailed as error:
            raise fail(str(error)) from error


def as_prompt(text: str, is_chat: bool) -> Prompt:
    return [Message("user", text)] if is_chat else text


@app.command()
def explain(
    prompt: str,
    address: Address = None,
    token: Token = None,
    ca: Ca = None,
    chat: Chat = False,
    json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Show where a prompt would be served now, and why. Runs nothing."""
    with client_of(address, token, ca) as client:
        try:
            route = client.explain_route(as_prompt(prompt, chat))
        except CallFailed as error:
            raise fail(str(error)) from error
    if json:
        print(json_format.dumps(asdict(route)))
        return
    out = Console()
    for table in show.route_tables(route):
        out.print(table)
    out.print(f"prefill on {route.prefill_worker or 'none'}: {route.prefill_reason}", markup=False)
    out.print(f"decode on {route.decode_worker or route.prefill_worker or 'none'}: {route.decode_reason}", markup=False)


@app.command()
def status(
    address: Address = None,
    token: Token = None,
    ca: Ca = None,
    json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Show routers, workers, their blocks, and what happened lately; as JSON, one line for each router."""
    answers: dict[str, Status] = {}
    for one in routers_at(address):
        with client_of(one, token, ca) as client:
            try:
                answers[one] = client.status()
            except CallFailed as error:
                fail(f"{one}: {error}")
    if not answers:
        raise typer.Exit(1)
    if json:
        for answer in answers.values():
            print(json_format.dumps(asdict(answer)))
        return
    out = Console()
    for one, answer in answers.items():
        out.print(show.router_lines(one, answer), markup=False, highlight=False)
    for table in show.status_tables(next(iter(answers.values()))):
        out.print(table)


@app.command()
def drain(
    who: Annotated[str, typer.Argument(help="A worker or a router by its id, or a worker by its own host:port.")],
    address: Address = None,
    token: Token = None,
    ca: Ca = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds; then it leaves whatever it still has. By its own address: to wait.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Another one takes its place when it has left.")] = False,
) -> None:
    """Let a worker or a router finish what it has, and leave; returns when it has. Nothing new goes there meanwhile."""
    waiting_s = (DRAIN_TIMEOUT_S if timeout is None else timeout) + wait_for.SETTLE_S
    if ":" in who:
        if replace:
            raise fail("a worker that is asked by its own address is replaced in any case; leave --replace out")
        try:
            is_done = wait_for.worker_to_leave(who, waiting_s)
        except ConnectionError as error:
            raise fail(str(error)) from error
    else:
        with client_of(address, token, ca) as client:
            try:
                goal = wait_for.end_of_drain(client.status(), who, replace)
                client.drain(who, timeout, replace)
                is_done = wait_for.until(goal, client.status, waiting_s + (START_TIMEOUT_S if replace else 0.0))
            except CallFailed as error:
                raise fail(str(error)) from error
    if not is_done:
        raise fail(f"{who} has not left after {waiting_s:g} s; `twinring status` shows what happens")
    console.print(f"{who} has {'been replaced' if replace else 'left'}", highlight=False)


@app.command()
def scale(
    sizes: Annotated[list[str], typer.Argument(help="prefill=3 decode=1; colocated: worker=4.")],
    address: Address = None,
    token: Token = None,
    ca: Ca = None,
) -> None:
    """Give pools another number of workers; returns when these serve. The newest go first, drained; where one pool
    shrinks and the other grows, workers change over with the model that they have loaded."""
    wanted = dict(parse_size(size) for size in sizes)
    with client_of(address, token, ca) as client:
        try:
            client.scale(wanted)
            is_done = wait_for.until(wait_for.has_sizes(wanted), client.status, DRAIN_TIMEOUT_S + START_TIMEOUT_S)
        except (CallFailed, ValueError) as error:  # the latter for what no message can carry
            raise fail(str(error)) from error
    if not is_done:
        raise fail("the pools do not have these sizes yet; `twinring status` shows what happens")
    console.print(f"pools have {' '.join(sizes)}", highlight=False)


def parse_size(size: str) -> tuple[str, int]:
    pool, _, number = size.partition("=")
    try:
        return pool, int(number)
    except ValueError:
        raise typer.BadParameter(f"{size!r} is not POOL=NUMBER, like prefill=3") from None


@app.command()
def stop() -> None:
    """Stop the servers that this user runs on this machine."""
    servers = running_servers()
    if not servers:
        raise fail("no server is running")
    for server in servers:
        os.kill(server.pid, signal.SIGTERM)
    timeout_s = STOP_TIMEOUT_S + max(server.drain_timeout_s for server in servers)
    give_up_at = time.monotonic() + timeout_s
    while alive := [server for server in servers if is_alive(server.pid)]:
        if time.monotonic() > give_up_at:
            raise fail(f"process {alive[0].pid} did not stop within {timeout_s:g} s")
        time.sleep(0.1)
    for server in servers:
        console.print(f"stopped {' and '.join(server.addresses)}", highlight=False)


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="The tenant's name.")],
    operator: Annotated[
        bool,
        typer.Option("--operator", help="May read the cluster's state and metrics, drain workers and resize pools."),
    ] = False,
) -> None:
    """Make a tenant's token: the token on standard output, its entry for tenants_file on standard error."""
    secret = f"twr-{secrets.token_urlsafe(TOKEN_NBYTES)}"
    print(secret)
    entry = {"name": name, "token_sha256": hash_of(secret), "is_operator": operator}
    console.print("under `tenants:` in tenants_file:", style="dim")
    console.print(f"  - {json_format.dumps(entry)}", highlight=False, markup=False, soft_wrap=True)


def client_of(address: str | None, token: str | None, ca: str | None) -> Client:
    try:
        return Client(routers_at(address), access=Access(token, ca))
    except OSError as error:
        raise fail(f"--ca {ca}: {error}") from error
    except ValueError as error:
        raise fail(f"--token: {error}") from error


def routers_at(address: str | None) -> tuple[str, ...]:
    """None: of the server that was started last on this machine."""
    if address is not None:
        try:
            return addresses_of(address)
        except ValueError as error:
            raise fail(f"--address: {error}") from error
    servers = running_servers()
    if not servers:
        raise fail("no server is running on this machine; start one with `twinring serve`, or give --address")
    return servers[-1].addresses


def main() -> None:
    sys.exit(app())


if __name__ == "__main__":
    main()
