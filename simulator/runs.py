"""Carries a comparison out: in one or several processes, with progress on standard error, and shows what came of it.
What is simulated is decided in plan.py and sweep.py."""

from __future__ import annotations

import json as json_format
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from simulator.autoscale import pools_table
from simulator.figure import check_drawable, draw
from simulator.limits import reference_for
from simulator.over_time import over_time_table, shown_rate
from simulator.plan import Plan, experiment_of
from simulator.report import Report, as_json, goodput_table, rates_table, waits_table
from simulator.sweep import CaseResult, Experiment, run_case, search

T = TypeVar("T")
console = Console(stderr=True)


def compare(plan: Plan, num_jobs: int, does_search: bool, json: str | None, figure: str | None) -> None:
    """From options to what is printed and written. Exit code 1, and one line, where the options cannot be."""
    try:
        check_outputs(num_jobs, json, figure)
        experiment, notes = experiment_of(plan, Random)
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    cases = carry_out(experiment, num_jobs, does_search, notes)
    if not cases:
        console.print("interrupted before a run ended")
        raise typer.Exit(1)
    reference = reference_for(experiment.offered, experiment.setup)
    show(Report(experiment, plan.source, plan.hardware, reference, cases, tuple(notes)), json, figure)


def check_outputs(num_jobs: int, json: str | None, figure: str | None) -> None:
    """ValueError before runs whose results could not be kept."""
    if num_jobs < 1:
        raise ValueError(f"jobs must be positive, not {num_jobs}")
    for path in (json, figure):
        if path not in (None, "-") and not Path(str(path)).absolute().parent.is_dir():
            raise ValueError(f"no folder for {path!r}")
    if figure is not None:
        check_drawable(Path(figure))


def show(report: Report, json: str | None, figure: str | None) -> None:
    if json is not None:
        text = json_format.dumps(as_json(report), indent=1, allow_nan=False)
        if json == "-":
            print(text)
        else:
            Path(json).write_text(text + "\n")
    out = console if json == "-" else Console()
    out.print(rates_table(report))
    out.print(waits_table(report))
    out.print(goodput_table(report))
    rate, setup = shown_rate(report), report.experiment.setup
    if setup.autoscaler.enabled:
        out.print(pools_table(report))
    if rate is not None and (setup.changes or setup.autoscaler.enabled):
        out.print(over_time_table(report, rate))
    for note in report.notes:
        out.print(f"note: {note}", highlight=False, markup=False)
    if figure is not None:
        draw(report, Path(figure))


# --- runs -----------------------------------------------------------------------------------------------------------


def carry_out(experiment: Experiment, num_jobs: int, does_search: bool, notes: list[str]) -> tuple[CaseResult, ...]:
    """By variant, ring seed and rate. Runs that ended before an interrupt are kept, and a note says so."""
    cases: list[CaseResult] = []
    pairs = [(variant, seed) for variant in experiment.variants for seed in experiment.ring_seeds]
    sweep = [partial(run_case, experiment, variant, rate, seed) for variant, seed in pairs for rate in experiment.rates]
    with bars() as progress, processes(num_jobs) as pool:
        try:
            task = progress.add_task("runs", total=len(sweep))
            for case in run_all(sweep, pool):
                cases.append(case)
                progress.advance(task)
            searches = []
            for variant, seed in pairs if does_search else ():
                known = [case for case in cases if (case.label, case.ring_seed) == (variant.label, seed)]
                searches.append(partial(search, experiment, variant, known))
            task = progress.add_task("searches", total=len(searches), visible=bool(searches))
            for found in run_all(searches, pool):
                cases += found
                progress.advance(task)
        except KeyboardInterrupt:
            notes.append("interrupted: what had ended is shown")
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)
    places = {pair: index for index, pair in enumerate((variant.label, seed) for variant, seed in pairs)}
    return tuple(sorted(cases, key=lambda case: (places[case.label, case.ring_seed], case.rate)))


def run_all(tasks: Sequence[Callable[[], T]], pool: Executor | None) -> Iterator[T]:
    """Results as they come."""
    if pool is None:
        for task in tasks:
            yield task()
        return
    for future in as_completed([pool.submit(task) for task in tasks]):
        yield future.result()


@contextmanager
def processes(num_jobs: int) -> Iterator[Executor | None]:
    """None for a single job, which this process does itself."""
    if num_jobs == 1:
        yield None
        return
    with ProcessPoolExecutor(
        num_jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is this process's to handle
    ) as pool:
        yield pool


def bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
