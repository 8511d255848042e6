"""`twinring bench`: parses, runs, prints. What loads the network client is imported when a run starts."""

from __future__ import annotations

import asyncio
import json as json_format
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench.load.arrivals import Arrivals
from bench.load.figure import check_drawable, draw
from bench.load.outcome import Outcome, Slo
from bench.load.plan import Endpoint, Plan, Target, parse_concurrencies, parse_rates
from bench.load.report import FORMAT_VERSION, LevelReport
from bench.load.show import report_table

bench_app = typer.Typer(help="Measure a server from outside.", no_args_is_help=True)
console = Console(stderr=True)


@bench_app.callback()
def bench() -> None:
    """Measure a server from outside."""


@bench_app.command()
def serve(
    url: Annotated[str, typer.Option(help="Where the OpenAI API is.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the first that the server names.")] = None,
    token: Annotated[
        str | None, typer.Option(envvar=["TWINRING_TOKEN", "OPENAI_API_KEY"], help="Bearer token.")
    ] = None,
    endpoint: Annotated[str, typer.Option(help="chat or completions.")] = "chat",
    rate: Annotated[str | None, typer.Option(help="Open loop: requests per second, e.g. 1,2,4.")] = None,
    arrivals: Annotated[Arrivals, typer.Option(help="When the requests of an open loop come.")] = Arrivals.POISSON,
    burst_size: Annotated[int, typer.Option(help="Requests per burst.")] = 8,
    concurrency: Annotated[str | None, typer.Option(help="Closed loop: clients, e.g. 1,8,32.")] = None,
    trace: Annotated[str | None, typer.Option(help="JSON lines in Mooncake's format.")] = None,
    speed: Annotated[float, typer.Option(help="How many times as fast the trace is replayed.")] = 1.0,
    trace_scale: Annotated[float, typer.Option(help="Factor on the trace's lengths.")] = 1.0,
    duration: Annotated[float | None, typer.Option(help="Seconds per level; default 30, or the trace's end.")] = None,
    requests: Annotated[int | None, typer.Option(help="Requests per level, instead of a duration.")] = None,
    prompt_tokens: Annotated[int, typer.Option()] = 512,
    output_tokens: Annotated[int, typer.Option()] = 128,
    shared_prefix_tokens: Annotated[int, typer.Option(help="With which all prompts begin.")] = 0,
    slo_ttft: Annotated[float, typer.Option(help="Seconds to the first token.")] = 1.0,
    slo_tpot: Annotated[float, typer.Option(help="Seconds per later token.")] = 0.05,
    timeout: Annotated[float, typer.Option(help="Seconds per request.")] = 120.0,
    warmup: Annotated[int, typer.Option(help="Requests that do not count, before the first level.")] = 1,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    json: Annotated[str | None, typer.Option(help="File for the results; - is standard output.")] = None,
    figure: Annotated[str | None, typer.Option(help="File for a figure: .svg, .png or .pdf.")] = None,
) -> None:
    """Measure any server of the OpenAI API under load: latencies, throughput, goodput."""
    try:
        plan = Plan(
            rates=parse_rates(rate) if rate else (),
            concurrencies=parse_concurrencies(concurrency) if concurrency else (),
            trace=trace,
            arrivals=arrivals,
            burst_size=burst_size,
            duration_s=duration,
            num_requests=requests,
            num_prompt_tokens=prompt_tokens,
            num_output_tokens=output_tokens,
            num_shared_tokens=shared_prefix_tokens,
            speed=speed,
            trace_scale=trace_scale,
            num_warmup=warmup,
            seed=seed,
            slo=Slo(slo_ttft, slo_tpot),
        )
        check_outputs(json, figure)
        target = Target(url, model, token, as_endpoint(endpoint), timeout)
        reports, notes = run(target, plan)
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    if not reports:
        raise typer.Exit(1)
    show(target, plan, reports, notes, json)
    if figure is not None:
        draw(reports, plan.slo, Path(figure))
    if not any(report.num_ok for report in reports):
        raise typer.Exit(1)


def as_endpoint(text: str) -> Endpoint:
    match text:
        case "chat" | "completions":
            return text
    raise ValueError(f"endpoint must be chat or completions, not {text!r}")


def check_outputs(json: str | None, figure: str | None) -> None:
    """ValueError before a run whose results could not be kept."""
    for path in (json, figure):
        if path not in (None, "-") and not Path(str(path)).absolute().parent.is_dir():
            raise ValueError(f"no folder for {path!r}")
    if figure is not None:
        check_drawable(Path(figure))


def run(target: Target, plan: Plan) -> tuple[list[LevelReport], list[str]]:
    """Levels that ended before an interrupt are kept."""
    from bench.load.runner import run_plan

    with Bars() as bars:
        try:
            notes = asyncio.run(run_plan(target, plan, bars))
        except KeyboardInterrupt:
            notes = ["interrupted: the levels that had ended are shown"]
    return bars.reports, notes


def show(target: Target, plan: Plan, reports: list[LevelReport], notes: list[str], json: str | None) -> None:
    if json is not None:
        text = results_json(target, plan, reports, notes)
        if json == "-":
            print(text)
        else:
            Path(json).write_text(text + "\n")
    out = console if json == "-" else Console()
    out.print(report_table(reports, plan.slo))
    for note in notes:
        out.print(f"note: {note}", highlight=False, markup=False)
    for report in reports:
        for note in report.notes:
            out.print(f"note: {report.name}: {note}", style="yellow", highlight=False, markup=False)
        if report.error_example:
            out.print(f"note: {report.name}: an error was: {report.error_example}", highlight=False, markup=False)


def results_json(target: Target, plan: Plan, reports: list[LevelReport], notes: list[str]) -> str:
    results = {
        "format": "twinring-bench-serve",
        "version": FORMAT_VERSION,
        "url": target.url,
        "endpoint": target.endpoint,
        "plan": plan.to_dict(),
        "notes": notes,
        "levels": [report.to_dict() for report in reports],
    }
    return json_format.dumps(results, indent=1)


class Bars:
    """A progress bar per level, on standard error; collects the reports."""

    def __init__(self) -> None:
        self.reports: list[LevelReport] = []
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f} ended, {task.fields[failed]} failed"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = TaskID(0)
        self._num_failed = 0

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def level_began(self, name: str, num_requests: int | None, duration_s: float | None) -> None:
        self._num_failed = 0
        description = f"{name} for {duration_s:g} s" if duration_s else name
        self._task = self._progress.add_task(description, total=num_requests, failed=0)

    def request_ended(self, outcome: Outcome) -> None:
        self._num_failed += not outcome.is_ok
        self._progress.update(self._task, advance=1, failed=self._num_failed)

    def level_ended(self, report: LevelReport) -> None:
        self.reports.append(report)
        self._progress.update(self._task, total=report.num_sent, completed=report.num_sent)
