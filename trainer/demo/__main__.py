"""``python -m trainer.demo prepare DIR``: makes the demonstration's model, codec and data."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from transformers.utils import logging as transformers_logging

from trainer.demo.prepare import prepare

logger = logging.getLogger("trainer.demo")


def main(arguments: list[str] | None = None) -> None:
    """Run one command; ``arguments`` are those of the command line when None."""
    parser = argparse.ArgumentParser(prog="python -m trainer.demo", description="The voice-cloning demonstration.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("prepare", help="make a small model, a codec and data to train it on")
    command.add_argument("directory", type=Path, metavar="DIR", help="where to write them")
    directory: Path = parser.parse_args(arguments).directory

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers_logging.disable_progress_bar()  # its bars for single files would break up our own
    made = prepare(directory)
    logger.info("model and tokenizer   %s", made.model)
    logger.info("demonstration codec   %s", made.audio_tokenizer)
    logger.info("training samples      %s (%d)", made.train_file, made.train_samples)
    logger.info("evaluation samples    %s (%d, most of voices not in training)", made.eval_file, made.eval_samples)


if __name__ == "__main__":
    main()
