"""`jaxserve simulate`: replays a trace of requests without a device, and shows what it would be like."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.simulation.report import Report, Spread


def add_simulate(commands: Any) -> None:
    """Adds the command to the parser."""
    text = "replay a trace of requests on a cost model, with the real scheduler and no device"
    parser: argparse.ArgumentParser = commands.add_parser(
        "simulate", help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    parser.set_defaults(run=run_simulate)
    parser.add_argument(
        "--trace",
        metavar="FILE",
        type=Path,
        required=True,
        help="JSON lines with timestamp (ms), input_length, output_length and perhaps hash_ids, as Mooncake's published traces",
    )
    parser.add_argument(
        "--cost", metavar="FILE", type=Path, required=True, help="JSON: what a step takes, and the engine's limits"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run_simulate(args: argparse.Namespace) -> None:
    from jaxserve.simulation.cost import read_cost
    from jaxserve.simulation.simulator import simulate
    from jaxserve.simulation.trace import read_trace

    cost, trace = read_cost(args.cost), read_trace(args.trace)
    report = simulate(trace, cost)
    if args.json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        _show(report, cost.name)


def _show(report: Report, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    times = Table("ms", title=title, show_edge=False)
    for name in ("mean", "p50", "p90", "p99"):
        times.add_column(name, justify="right")
    rows = {"time to first token": report.ttft_ms, "between tokens": report.itl_ms, "whole request": report.e2e_ms}
    for name, spread in rows.items():
        times.add_row(name, *_cells(spread))
    figures = Table("", show_edge=False, show_header=False)
    figures.add_column(justify="right")
    for name, text in {
        "requests": f"{report.num_requests:,} in {report.seconds:,.2f} s, {report.requests_per_s:,.2f} a second",
        "output tokens a second": f"{report.output_tokens_per_s:,.0f}",
        "tokens a second": f"{report.total_tokens_per_s:,.0f}",
        "KV pages in use": f"{report.kv_use:.1%}, at most {report.kv_use_peak:.1%}",
        "KV waste in these": f"{report.kv_waste:.2%}",
        "prompt tokens from the prefix cache": f"{report.prefix_hit_rate:.1%}",
        "preemptions": f"{report.preemptions:,}",
        "steps": f"{report.steps:,}",
    }.items():
        figures.add_row(name, text)
    console = Console()
    console.print(times)
    console.print(figures)


def _cells(spread: Spread) -> list[str]:
    return [f"{value:,.2f}" for value in (spread.mean, spread.p50, spread.p90, spread.p99)]
