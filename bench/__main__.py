"""`python -m bench`: lists the benchmarks, or runs one and shows its figures."""

from __future__ import annotations

import argparse
import contextlib
import sys

from rich.console import Console

from bench.harness import WithSections, benchmark_names, description_of, load_benchmark, print_table, to_json


def print_list(console: Console) -> None:
    names = benchmark_names()
    for name in names:
        console.print(f"{name:<20} {description_of(name)}", markup=False, highlight=False, soft_wrap=True)
    if not names:
        console.print("no benchmarks yet")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Lists the benchmarks, or runs one.")
    parser.add_argument("name", nargs="?", help="which one; without it, lists them")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller runs: does it work, not how fast")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--only", metavar="SECTION,...", help="of a benchmark that has sections: no others")
    arguments = parser.parse_args()
    console = Console()
    if arguments.name is None:
        print_list(console)
        return 0
    try:
        benchmark = load_benchmark(arguments.name)
    except ValueError as error:
        parser.error(str(error))
    sections: dict[str, tuple[str, ...]] = {}
    if arguments.only is not None:
        if not isinstance(benchmark, WithSections):
            parser.error(f"{arguments.name} has no sections")
        sections["only"] = tuple(arguments.only.split(","))
        if unknown := [name for name in sections["only"] if name not in benchmark.SECTIONS]:
            parser.error(f"no section {', '.join(unknown)}; there are: {', '.join(benchmark.SECTIONS)}")
    with contextlib.redirect_stdout(sys.stderr):  # Ray tells there of workers that died; the figures come alone
        figures = benchmark.run(quick=arguments.quick, **sections)
    if arguments.json:
        print(to_json(arguments.name, figures, benchmark))
    else:
        print_table(console, arguments.name, figures)
    return benchmark.exit_code(figures) if isinstance(benchmark, WithSections) else 0


if __name__ == "__main__":
    sys.exit(main())
