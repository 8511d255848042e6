"""Reports to a table for people: a row per figure, a column per load level."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.load.outcome import Slo
    from bench.load.report import LevelReport, Spread


def report_table(reports: Sequence[LevelReport], slo: Slo) -> Table:
    table = Table(title=f"SLOs: TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s * 1e3:g} ms", title_justify="left")
    table.add_column("")
    for report in reports:
        table.add_column(report.name, justify="right")
    columns = [rows_of(report) for report in reports]
    for name in columns[0]:
        table.add_row(escape(name), *(escape(column[name]) for column in columns))
    return table


def rows_of(report: LevelReport) -> dict[str, str]:
    return {
        "sent": str(report.num_sent),
        "ok": str(report.num_ok),
        "errors": ", ".join(f"{kind} {count}" for kind, count in report.errors.items()) or "-",
        "prompt / cached / output tokens, mean": " / ".join(
            map(
                count_text,
                (report.num_prompt_tokens_mean, report.num_cached_tokens_mean, report.num_output_tokens_mean),
            )
        ),
        "TTFT p50 / p90 / p99, ms": spread_text(report.ttft_s),
        "TPOT p50 / p90 / p99, ms": spread_text(report.tpot_s),
        "ITL p50 / p90 / p99, ms": spread_text(report.itl_s),
        "E2E p50 / p90 / p99, ms": spread_text(report.e2e_s),
        "requests/s": f"{report.requests_per_s:.2f}",
        "output tokens/s": f"{report.output_tokens_per_s:.1f}",
        "goodput, requests/s": f"{report.goodput_requests_per_s:.2f}",
        "in SLO, of those sent": f"{report.num_in_slo / report.num_sent:.0%}" if report.num_sent else "-",
        "sent late p99, ms": f"{report.send_lateness_p99_s * 1e3:.1f}",
        "generator lag p99, ms": f"{report.loop_lag_p99_s * 1e3:.1f}",
    }


def spread_text(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return " / ".join(
        f"{value * 1e3:.3g}" if value < 1 else f"{value * 1e3:.0f}" for value in (spread.p50, spread.p90, spread.p99)
    )


def count_text(count: float | None) -> str:
    return "-" if count is None else f"{count:.0f}"
