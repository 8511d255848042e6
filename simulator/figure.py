"""Draws a comparison: goodput and hit rate by rate, and the load of the prefill workers over time. Needs matplotlib
(the extra `plot`)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from simulator.report import points_of
from simulator.sweep import MIN_ATTAINMENT, is_good
from simulator.transforms import ideal_hit_rate

if TYPE_CHECKING:
    from pathlib import Path

    from simulator.report import Report

SUFFIXES = (".svg", ".png", ".pdf")


def check_drawable(path: Path) -> None:
    """ValueError before runs whose figure could not be drawn after them."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"figure must end in {', '.join(SUFFIXES)}, not {str(path)!r}")
    if find_spec("matplotlib") is None:
        raise ValueError("a figure needs matplotlib: pip install 'twinring[plot]'")


def draw(report: Report, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    goodput, hits, load = figure.subplots(1, 3)
    for index, variant in enumerate(report.experiment.variants):
        points = points_of(report.of(variant.label))
        rates, style = [point.rate for point in points], {"color": f"C{index}", "label": variant.label}
        goodput.plot(rates, [point.goodput for point in points], "o-", markersize=3, **style)
        hits.plot(rates, [point.hit_rate for point in points], "o-", markersize=3, **style)
    _finish_goodput(goodput, report)
    hits.axhline(ideal_hit_rate(report.experiment.requests), color="0.5", linestyle=":", label="infinite cache")
    hits.set(ylabel="hit rate", ylim=(0, 1), xlabel="requests/s")
    _draw_load(load, report)
    for axes in (goodput, hits, load):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def _finish_goodput(axes: Any, report: Report) -> None:
    rates = sorted({case.rate for case in report.cases})
    axes.plot(rates, [MIN_ATTAINMENT * rate for rate in rates], color="0.5", linestyle="--", label="90 % of the rate")
    axes.axvline(report.reference.rate, color="0.5", linestyle=":", label="reference")
    axes.set(ylabel="requests/s in both SLOs", xlabel="requests/s", ylim=(0, None))


def _draw_load(axes: Any, report: Report) -> None:
    """Mean, and the band from least to most busy, at a rate that every variant ran."""
    rate = _shown_rate(report)
    if rate is None:
        return
    for index, variant in enumerate(report.experiment.variants):
        case = next(case for case in report.of(variant.label) if case.rate == rate)
        times = [load.at_s for load in case.loads]
        axes.plot(times, [load.mean for load in case.loads], color=f"C{index}", label=variant.label)
        least, most = [load.least for load in case.loads], [load.most for load in case.loads]
        axes.fill_between(times, least, most, color=f"C{index}", alpha=0.2, linewidth=0)
    axes.set(ylabel=f"busy share, at {rate:.4g} requests/s", xlabel="s", ylim=(0, 1.05))


def _shown_rate(report: Report) -> float | None:
    """The highest of the rates asked for at which some variant is still good, for beyond it all are always busy."""
    asked = [{c.rate for c in report.of(v.label) if not c.is_searched} for v in report.experiment.variants]
    common = set.intersection(*asked)
    good = {case.rate for case in report.cases if is_good(case)} & common
    return max(good, default=min(common, default=None))
