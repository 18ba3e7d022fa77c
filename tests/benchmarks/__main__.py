"""``make bench``: measurements side by side in one run, as medians and ratios. Not tests: they pass no judgement."""

from __future__ import annotations

import argparse
import logging
import platform

import torch
from rich.console import Console
from rich.table import Table

import trainer as _trainer  # noqa: F401  (first: repairs what transformers imports)


def main() -> None:
    """Run every benchmark and print one table each."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--pairs", type=int, default=8, help="due steps measured for each component, at least 2")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)

    from tests.benchmarks import hand_over, memory, off_due, step_time

    console = Console()
    processor = platform.processor() or platform.machine()
    console.print(f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    show(console, "A step that is not due", ("callback", "µs a step", "ratio to empty"), off_due.report())
    columns = ("way", "ms of the training thread a step", "against SummaryWriter")
    show(console, "1,000 scalars a step", columns, hand_over.report())
    show(console, "Through queue and backend", ("backend", "scalars a second"), hand_over.throughput())
    title = f"Training step, {step_time.describe()}"
    columns = ("due", "due step, s", "step around it, s", "ratio", "quartiles")
    show(console, title, columns, step_time.report(arguments.pairs))
    show(console, "Peak memory of the same", ("mode", "MB", "ratio to plain"), memory.report())


def show(console: Console, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """One table."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
