"""``make bench``: measurements side by side in one run, as medians and ratios. Not tests: they pass no judgement."""

from __future__ import annotations

import argparse
import logging
import platform
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import trainer as _trainer  # noqa: F401  (first: repairs what transformers imports)


def main() -> None:
    """Run every benchmark, or those that are named, and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"only these: {', '.join(BENCHMARKS)}")
    parser.add_argument("--pairs", type=int, default=8, help="due steps measured for each component, at least 2")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    logging.disable(logging.INFO)
    console = Console()
    processor = platform.processor() or platform.machine()
    console.print(f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in arguments.names or BENCHMARKS:
        BENCHMARKS[name](console, arguments)


def _off_due(console: Console, _arguments: argparse.Namespace) -> None:
    from tests.benchmarks import off_due

    show(console, "A step that is not due", ("callback", "µs a step", "ratio to empty"), off_due.report())


def _hand_over(console: Console, _arguments: argparse.Namespace) -> None:
    from tests.benchmarks import hand_over

    columns = ("way", "ms of the training thread a step", "against SummaryWriter")
    show(console, "1,000 scalars a step", columns, hand_over.report())
    show(console, "Through queue and backend", ("backend", "scalars a second"), hand_over.throughput())


def _step_time(console: Console, arguments: argparse.Namespace) -> None:
    from tests.benchmarks import step_time

    title = f"Training step, {step_time.describe()}"
    columns = ("due", "due step, s", "step around it, s", "ratio", "quartiles")
    show(console, title, columns, step_time.report(arguments.pairs))


def _setup_checks(console: Console, arguments: argparse.Namespace) -> None:
    from tests.benchmarks import setup_checks, step_time

    title = f"Due steps with and without the set-up checks, {step_time.describe()}"
    columns = ("due step", "with, s", "without, s", "ratio")
    show(console, title, columns, setup_checks.report(arguments.pairs))


def _families(console: Console, arguments: argparse.Namespace) -> None:
    from tests.benchmarks import families

    title = f"Training step of other speech models, {families.describe()}"
    columns = ("due", "due step, s", "step around it, s", "ratio", "quartiles")
    show(console, title, columns, families.report(arguments.pairs))


def _overhead(console: Console, arguments: argparse.Namespace) -> None:
    from tests.benchmarks import overhead

    columns = ("model", "due", "ms a step without", "with", "its share by that", "share recorded", "ratio")
    show(console, "What telemetry costs, and what it says of that", columns, overhead.report(arguments.pairs))


def _memory(console: Console, _arguments: argparse.Namespace) -> None:
    from tests.benchmarks import memory, step_time

    title = f"Peak memory of a training step, {step_time.describe()}"
    show(console, title, ("mode", "MB", "ratio to plain"), memory.report())


def _attention_probe(console: Console, _arguments: argparse.Namespace) -> None:
    from tests.benchmarks import attention_probe

    title = (
        f"Looking at attention: forward pass of {attention_probe.LAYERS} layers, {attention_probe.POSITIONS} positions"
    )
    columns = ("mode", "s", "extra s", "of the whole's", "peak MB", "extra MB", "of the whole's")
    show(console, title, columns, attention_probe.report())
    show(console, "Largest difference from the whole", ("measure", "difference"), attention_probe.agreement())


def _report(console: Console, _arguments: argparse.Namespace) -> None:
    from tests.benchmarks import report

    title = f"HTML report of {report.STEPS} steps of {report.SCALARS} scalars"
    show(console, title, ("what", "measured"), report.rows())


def _gradient_sweep(console: Console, _arguments: argparse.Namespace) -> None:
    from tests.benchmarks import gradient_sweep

    columns = ("way", "ms", "ratio to one read", "times faster than wandb.watch")
    show(console, gradient_sweep.describe(), columns, gradient_sweep.report())


def _reduction(console: Console, _arguments: argparse.Namespace) -> None:
    from tests.benchmarks import reduction

    title = f"Bringing {reduction.TAGS} metrics of all ranks together, without the network"
    columns = ("ranks", "ms of rank 0's interpreter", "quartiles", "KB sent", "ratio to the fewest")
    show(console, title, columns, reduction.report())


def _wandb_hand_over(console: Console, _arguments: argparse.Namespace) -> None:
    from tests.benchmarks import wandb_hand_over

    title = f"A due step of {wandb_hand_over.SCALARS} scalars and a table with sound and pictures, to W&B"
    columns = ("server", "µs of the training thread", "largest", "ratio", "s to the server, median / largest")
    show(console, title, columns, wandb_hand_over.report())


def _endurance(console: Console, _arguments: argparse.Namespace) -> None:
    from tests.benchmarks import endurance

    show(console, "Due steps of a tiny model", ("step", "resident MB", "files", "threads"), endurance.report())


BENCHMARKS: dict[str, Callable[[Console, argparse.Namespace], None]] = {
    "off_due": _off_due,
    "hand_over": _hand_over,
    "step_time": _step_time,
    "setup_checks": _setup_checks,
    "families": _families,
    "overhead": _overhead,
    "memory": _memory,
    "attention_probe": _attention_probe,
    "gradient_sweep": _gradient_sweep,
    "report": _report,
    "reduction": _reduction,
    "wandb_hand_over": _wandb_hand_over,
    "endurance": _endurance,
}


def show(console: Console, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """One table."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
