"""``make bench``: measurements side by side in one run, as medians and ratios. Not tests: they pass no judgement.

All of them together are written to ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as Shown

import trainer as _trainer  # noqa: F401  (first: repairs what transformers imports)

MINUTES = 8  # of all of them, on two cores; what would not end by then is left out
DOCUMENT = Path(__file__).parents[2] / "docs" / "performance.md"
Rows = Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Table:
    """What was measured."""

    title: str
    columns: tuple[str, ...]
    rows: Rows


@dataclass(frozen=True)
class Part:
    """One benchmark.

    Attributes:
        promise: what is promised.
        seconds: about how long it takes among all.
        measure: measures it, given a number of pairs and whether it is to be brief, as one among all.
    """

    promise: str
    seconds: int
    measure: Callable[[int, bool], Iterator[Table]]


def main() -> None:
    """Run every benchmark and write the document, or those that are named, and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"only these: {', '.join(PARTS)}")
    parser.add_argument("--pairs", type=int, default=3, help="due steps measured for each component, at least 2")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(PARTS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    logging.disable(logging.INFO)
    threads = str(max(1, (os.cpu_count() or 2) - 1))  # the background has a core: threads that spin would take it
    os.environ.setdefault("OMP_NUM_THREADS", threads)  # for programs that are started
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    console = Console()
    console.print(machine := _machine())
    found: dict[str, tuple[list[Table], float]] = {}
    until = time.perf_counter() + MINUTES * 60
    for name in arguments.names or PARTS:
        began, tables = time.perf_counter(), list[Table]()
        if not arguments.names and began + PARTS[name].seconds > until:
            console.print(f"{name} is left out: it takes {PARTS[name].seconds} s, and the time is up")
            continue
        for table in PARTS[name].measure(arguments.pairs, not arguments.names):
            tables.append(table)
            _show(console, table)
        found[name] = tables, time.perf_counter() - began
        if not arguments.names:
            DOCUMENT.write_text(_document(found, machine))
            console.print(f"written to {DOCUMENT}")


def _off_due(_pairs: int, _brief: bool) -> Iterator[Table]:
    from tests.benchmarks import off_due

    yield Table("A step that is not due", ("callback", "µs a step", "ratio to empty"), off_due.report())


def _hand_over(_pairs: int, _brief: bool) -> Iterator[Table]:
    from tests.benchmarks import hand_over

    columns = ("way", "ms of the training thread a step", "against SummaryWriter")
    yield Table("1,000 scalars a step", columns, hand_over.report())
    yield Table("Through queue and backend", ("backend", "scalars a second"), hand_over.throughput())


def _reduction(_pairs: int, _brief: bool) -> Iterator[Table]:
    from tests.benchmarks import reduction

    title = f"Bringing {reduction.TAGS} metrics of all ranks together, without the network"
    columns = ("ranks", "ms of rank 0's interpreter", "quartiles", "KB sent", "ratio to the fewest")
    yield Table(title, columns, reduction.report())


def _step_time(pairs: int, brief: bool) -> Iterator[Table]:
    from tests.benchmarks import step_time

    title = f"Training step, {step_time.describe()}"
    columns = ("due", "due step, s", "step around it, s", "ratio", "quartiles")
    yield Table(title, columns, step_time.report(pairs, brief))


def _setup_checks(pairs: int, brief: bool) -> Iterator[Table]:
    from tests.benchmarks import setup_checks, step_time

    title = f"Due steps with and without the set-up checks, {step_time.describe()}"
    columns = ("due step", "with, s", "without, s", "ratio")
    yield Table(title, columns, setup_checks.report(1 if brief else max(2, pairs // 2)))


def _families(pairs: int, brief: bool) -> Iterator[Table]:
    from tests.benchmarks import families

    title = f"Training step of other speech models, {families.describe()}"
    columns = ("due", "due step, s", "step around it, s", "ratio", "quartiles")
    yield Table(title, columns, families.report(2 if brief else pairs, brief))


def _overhead(pairs: int, _brief: bool) -> Iterator[Table]:
    from tests.benchmarks import overhead

    columns = ("model", "due", "ms a step without", "with", "ratio", "quartiles", "its share by that", "share recorded")
    yield Table("Trainings of small models", columns, overhead.report(pairs))


def _memory(_pairs: int, brief: bool) -> Iterator[Table]:
    from tests.benchmarks import memory, step_time

    title = f"Peak memory of a training step, {step_time.describe()}"
    yield Table(title, ("mode", "MB", "ratio to plain"), memory.report(1 if brief else 2))


def _attention_probe(_pairs: int, brief: bool) -> Iterator[Table]:
    from tests.benchmarks import attention_probe

    title = (
        f"Looking at attention: forward pass of {attention_probe.LAYERS} layers, {attention_probe.POSITIONS} positions"
    )
    columns = ("mode", "s", "extra s", "of the whole's", "peak MB", "extra MB", "of the whole's")
    yield Table(title, columns, attention_probe.report(3 if brief else 9))
    yield Table("Largest difference from the whole", ("measure", "difference"), attention_probe.agreement())


def _report(_pairs: int, _brief: bool) -> Iterator[Table]:
    from tests.benchmarks import report

    title = f"HTML report of {report.STEPS} steps of {report.SCALARS} scalars"
    yield Table(title, ("what", "measured"), report.rows())


def _gradient_sweep(_pairs: int, _brief: bool) -> Iterator[Table]:
    from tests.benchmarks import gradient_sweep

    columns = ("way", "ms", "ratio to one read", "times faster than wandb.watch")
    yield Table(gradient_sweep.describe(), columns, gradient_sweep.report())


def _wandb_hand_over(_pairs: int, brief: bool) -> Iterator[Table]:
    from tests.benchmarks import wandb_hand_over

    title = f"A due step of {wandb_hand_over.SCALARS} scalars and a table with sound and pictures, to W&B"
    columns = ("server", "µs of the training thread", "largest", "ratio", "s to the server, median / largest")
    yield Table(title, columns, wandb_hand_over.report(0.1 if brief else 0.5))


def _endurance(_pairs: int, brief: bool) -> Iterator[Table]:
    from tests.benchmarks import endurance

    columns = ("step", "resident MB", "files", "threads")
    yield Table("Due steps of a tiny model", columns, endurance.report(3_000 if brief else 10_000))


PARTS: dict[str, Part] = {
    "off_due": Part("A step that is not due costs microseconds.", 8, _off_due),
    "reduction": Part("Rank 0's cost does not grow with the number of ranks; at most 5 ms a due step.", 3, _reduction),
    "hand_over": Part("The training thread hands numbers over, and waits for no writer.", 12, _hand_over),
    "report": Part("The HTML report of a long run is made, and opens, at once.", 10, _report),
    "gradient_sweep": Part("All gradients are looked at for about the cost of reading them.", 10, _gradient_sweep),
    "overhead": Part("What telemetry costs a whole training of a small model, and says that it does.", 60, _overhead),
    "step_time": Part("A due step takes little longer than the steps around it.", 60, _step_time),
    "memory": Part("A due step needs little more memory.", 50, _memory),
    "attention_probe": Part("Attention is looked at for a sample of queries, not as a whole.", 40, _attention_probe),
    "wandb_hand_over": Part("A slow server slows no step.", 70, _wandb_hand_over),
    "setup_checks": Part("Set-up checks cost once, on the first due step.", 60, _setup_checks),
    "endurance": Part("Memory, files and threads do not grow.", 40, _endurance),
    "families": Part("So it is with other speech models, and where a fused loss hides the logits.", 80, _families),
}


def _machine() -> str:
    processor = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    busy = f"load {os.getloadavg()[0]:.1f} at the beginning" if hasattr(os, "getloadavg") else "load unknown"
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {busy}"
    return f"{processor}, {cores}, {device}, torch {torch.__version__}"


def _commit() -> str:
    """The commit that is measured, and whether the files are its own."""
    git = ["git", "-C", str(DOCUMENT.parents[1])]
    changes = [*git, "status", "--porcelain", "-uno", ".", ":!docs/performance.md"]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(changes, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "commit unknown"
    return f"commit {commit.stdout.strip()}" + (" with changes" if changed.stdout.strip() else "")


def _document(found: dict[str, tuple[list[Table], float]], machine: str) -> str:
    whole = sum(seconds for _, seconds in found.values())
    lines = [
        "# Performance",
        "",
        f"Written by `make bench`, which took {whole / 60:.1f} min: {machine}; {_commit()}.",
        "Medians. Ratios are of neighbours in time; their quartiles say how far to trust them where others work too.",
        "A part alone, at more length: `python -m tests.benchmarks step_time`.",
    ]
    if left_out := [f"`{name}`" for name in PARTS if name not in found]:
        lines.append(f"Left out, for the time would not have done: {', '.join(left_out)}.")
    for name, (tables, seconds) in found.items():
        lines += ["", f"## `{name}`", "", f"{PARTS[name].promise} ({seconds:.0f} s)"]
        for table in tables:
            lines += ["", f"{table.title}:", "", _row(table.columns), _row(["---"] * len(table.columns))]
            lines += map(_row, table.rows)
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _show(console: Console, table: Table) -> None:
    shown = Shown(*table.columns, title=table.title)
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)


if __name__ == "__main__":
    main()
