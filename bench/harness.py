"""What a benchmark is, and how its figures are timed and shown. Knows nothing of what is measured.

A benchmark is a module bench/<name>.py with DESCRIPTION, one line, and run(quick) -> list[Figure]."""

from __future__ import annotations

import ast
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal, Protocol, cast, runtime_checkable

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value. A figure without a target is there to be read, not to pass."""

    key: str
    value: float
    unit: str
    target: float | None = None
    better: Literal["higher", "lower"] = "higher"
    note: str = ""

    @property
    def meets_target(self) -> bool | None:
        """None where there is no target."""
        if self.target is None:
            return None
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


class Benchmark(Protocol):
    DESCRIPTION: str

    def run(self, quick: bool) -> list[Figure]: ...


@runtime_checkable
class WithJson(Protocol):
    def json_of(self, figures: list[Figure]) -> dict[str, Any]: ...


@runtime_checkable
class WithSections(Protocol):
    """Can be run in parts, and knows whether what it found is wrong rather than slow."""

    SECTIONS: Mapping[str, object]

    def run(self, quick: bool, only: tuple[str, ...] = ()) -> list[Figure]: ...

    def exit_code(self, figures: list[Figure]) -> int: ...


# --- discovery ----------------------------------------------------------------------------------------------------


def benchmark_names() -> list[str]:
    modules = (module.name for module in iter_modules([str(Path(__file__).parent)]) if not module.ispkg)
    return sorted(name for name in modules if name != "harness" and not name.startswith("_"))


def description_of(name: str) -> str:
    """A benchmark's DESCRIPTION, read without importing it: to list them must not take loading torch."""
    for node in ast.parse((Path(__file__).parent / f"{name}.py").read_text()).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="DESCRIPTION")], value=ast.Constant(value=str(text))):
                return text
    raise AssertionError(f"bench/{name}.py has no DESCRIPTION = '...'")


def load_benchmark(name: str) -> Benchmark:
    """ValueError where there is no benchmark of that name."""
    if name not in benchmark_names():
        raise ValueError(f"no benchmark named {name!r}; there are: {', '.join(benchmark_names()) or 'none'}")
    return cast(Benchmark, import_module(f"bench.{name}"))


# --- timing -------------------------------------------------------------------------------------------------------


def time_of(fn: Callable[[], object]) -> float:
    """Wall time of one call, in seconds."""
    started_at = time.perf_counter()
    fn()
    return time.perf_counter() - started_at


def core_time_of(fn: Callable[[], object]) -> float:
    """Seconds of processor time that one call takes: for what computes on one core, whoever else uses the machine."""
    started_at = time.process_time()
    fn()
    return time.process_time() - started_at


def median_of(n: int, fn: Callable[[], float]) -> float:
    """Median of n values of fn."""
    return statistics.median(fn() for _ in range(n))


def interleave(runs: int, fns: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Values of each fn, taken in turns and in alternating order, so that a slow minute of a shared machine, or the
    state that one fn leaves behind, falls on all of them alike."""
    values: dict[str, list[float]] = {name: [] for name in fns}
    for run in range(runs):
        for name in fns if run % 2 == 0 else reversed(list(fns)):
            values[name].append(fns[name]())
    return values


# --- reporting ----------------------------------------------------------------------------------------------------


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def machine() -> dict[str, str | int]:
    """Where the figures were taken."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def to_json(name: str, figures: list[Figure], benchmark: Benchmark) -> str:
    """With what the benchmark's own json_of(figures) makes of them, where it has one."""
    rows = [asdict(figure) | {"meets_target": figure.meets_target} for figure in figures]
    more = benchmark.json_of(figures) if isinstance(benchmark, WithJson) else {}
    return json.dumps({"name": name, "machine": machine(), "figures": rows, **more})


def print_table(console: Console, name: str, figures: list[Figure]) -> None:
    table = Table(title=escape(name), title_justify="left")
    for column in ("figure", "value", "unit", "target", "", "note"):
        table.add_column(column, justify="right" if column in ("value", "target") else "left")
    verdicts = {None: "", True: "[green]met[/green]", False: "[red]missed[/red]"}
    for figure in figures:
        sign = ">=" if figure.better == "higher" else "<="
        target = "" if figure.target is None else f"{sign} {figure.target:.5g}"
        row = (escape(figure.key), f"{figure.value:.5g}", escape(figure.unit), target)
        table.add_row(*row, verdicts[figure.meets_target], escape(figure.note))
    console.print(table)
    facts = machine()
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, Python {facts['python']}, torch {facts['torch']}",
        style="dim",
        highlight=False,
    )
