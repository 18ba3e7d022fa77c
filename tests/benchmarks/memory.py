"""Peak memory of a training with telemetry at every step, against without: each in a process of its own."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile

STEPS = 3


def report(rounds: int) -> list[tuple[str, ...]]:
    """Rows of mode, peak resident MB (median), and ratio to plain."""
    peaks: dict[str, list[float]] = {"plain": [], "due: all": []}
    for _ in range(rounds):
        for mode, values in peaks.items():
            command = [sys.executable, "-m", "tests.benchmarks.memory", mode]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            values.append(float(done.stdout.split()[-1]))
    base = statistics.median(peaks["plain"])
    return [
        (mode, f"{statistics.median(values):,.0f}", f"{statistics.median(values) / base:.3f}")
        for mode, values in peaks.items()
    ]


def main(mode: str) -> None:
    """Train a little and print the peak."""
    import trainer as _trainer  # noqa: F401  (first: repairs what transformers imports)
    from tests.benchmarks import step_time

    callbacks = [step_time.telemetry(None, 1)] if mode == "due: all" else []
    with tempfile.TemporaryDirectory() as directory:
        step_time.train(step_time.make_model(), step_time.SyntheticSpeech(8), callbacks, STEPS, directory)
    sys.stdout.write(f"\n{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}\n")


if __name__ == "__main__":
    main(sys.argv[1])
