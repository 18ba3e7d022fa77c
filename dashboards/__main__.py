"""What people open, made from the catalogue."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. A fault ends it with one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m dashboards", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    metrics = commands.add_parser("metrics", help="print the metric reference")
    metrics.set_defaults(run=_metrics)
    wandb = commands.add_parser("wandb", help="create or update the Weights & Biases workspace of a project")
    wandb.add_argument("--entity", required=True, help="user or team")
    wandb.add_argument("--project", required=True, help="project that runs are logged to")
    wandb.set_defaults(run=_wandb)
    report = commands.add_parser("report", help="write runs as one HTML file that needs no server and no network")
    report.add_argument("directories", metavar="RUN_DIR", nargs="+", type=Path, help="what --logging_dir named")
    report.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="default: %(default)s")
    report.set_defaults(run=_report)
    status = commands.add_parser(
        "status", help="say whether runs are well; exit code 0 well, 1 warning, 2 failing, 3 no data"
    )
    status.add_argument("directories", metavar="RUN_DIR", nargs="+", type=Path, help="its logs or its output directory")
    how = status.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="for programs: docs/alerts.md has its shape")
    how.add_argument("--follow", action="store_true", help="stay, until every run has ended")
    status.set_defaults(run=_status)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


def _metrics(_arguments: argparse.Namespace) -> None:
    from dashboards.metric_reference import metric_reference

    sys.stdout.write(metric_reference())


def _wandb(arguments: argparse.Namespace) -> None:
    try:
        from dashboards.workspace import publish
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed: pip install 'strategic-telemetry[wandb]'")
    try:
        published = publish(arguments.entity, arguments.project)
    except Exception as error:  # noqa: BLE001  (the client raises what its server and network do)
        _fail(f"{arguments.entity}/{arguments.project}: {error}")
    sys.stdout.write(f"{published.change}: {published.url}\n")


def _report(arguments: argparse.Namespace) -> None:
    try:
        from dashboards.report import write_report
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed: pip install 'strategic-telemetry[report]'")
    from dashboards.runs import NothingToShowError

    try:
        written = write_report(arguments.directories, arguments.output)
    except NothingToShowError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"cannot make {arguments.output}: {error.strerror}")
    parts = ", ".join(f"{name} {nbytes / 1e6:.1f}" for name, nbytes in written.parts.items())
    path = str(written.path).encode("utf-8", "backslashreplace").decode()
    sys.stdout.write(f"{path}: {written.nbytes / 1e6:.1f} MB ({parts}); open it in a browser\n")


def _status(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from dashboards import status

    if arguments.json:
        statuses = status.look(arguments.directories)
        sys.stdout.write(f"{status.as_json(statuses)}\n")
        sys.exit(status.exit_code(statuses))
    shows = status.follow if arguments.follow else status.show
    sys.exit(shows(arguments.directories, Console(soft_wrap=False)))


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
