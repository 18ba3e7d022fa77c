"""``python -m dashboards metrics``: the metric reference, on standard output."""

from __future__ import annotations

import argparse
import sys

from dashboards.metric_reference import metric_reference


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m dashboards", description=__doc__)
    parser.add_subparsers(dest="command", required=True).add_parser("metrics", help="print the metric reference")
    parser.parse_args()
    sys.stdout.write(metric_reference())


if __name__ == "__main__":
    main()
