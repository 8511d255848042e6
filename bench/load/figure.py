"""Draws reports: latencies and rates over the load. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.load.outcome import Slo
    from bench.load.report import LevelReport

SUFFIXES = (".svg", ".png", ".pdf")
PERCENTILES = ("p50", "p90", "p99")


def check_drawable(path: Path) -> None:
    """ValueError before a run whose figure could not be drawn after it."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"figure must end in {', '.join(SUFFIXES)}, not {str(path)!r}")
    if find_spec("matplotlib") is None:
        raise ValueError("a figure needs matplotlib: pip install 'twinring[plot]'")


def draw(reports: Sequence[LevelReport], slo: Slo, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    ttft, tpot, rates = figure.subplots(1, 3)
    names = [report.name for report in reports]
    draw_spreads(ttft, names, [report.ttft_s for report in reports], "TTFT, s", slo.ttft_s)
    draw_spreads(tpot, names, [report.tpot_s for report in reports], "TPOT, s", slo.tpot_s)
    rates.plot(names, [report.requests_per_s for report in reports], "o--", color="0.6", label="finished")
    rates.plot(names, [report.goodput_requests_per_s for report in reports], "o-", color="C2", label="in both SLOs")
    rates.set_ylabel("requests/s")
    rates.set_ylim(bottom=0)
    for axes in (ttft, tpot, rates):
        axes.tick_params(axis="x", labelrotation=30)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path)


def draw_spreads(axes: Any, names: Sequence[str], spreads: Sequence[Any], label: str, slo_s: float) -> None:
    for index, percentile in enumerate(PERCENTILES):
        values = [float("nan") if spread is None else getattr(spread, percentile) for spread in spreads]
        axes.plot(names, values, "o-", color="C0", alpha=1 - 0.3 * index, label=percentile)
    axes.axhline(slo_s, color="C3", linestyle=":", label="SLO")
    axes.set_ylabel(label)
    axes.set_yscale("log")
