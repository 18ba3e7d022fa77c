"""The tiny training under its short name, for programs run by hand: ``PYTHONPATH=.:tests/faults python PROGRAM``."""

import trainer  # noqa: F401  (first: repairs what transformers imports)

# isort: split
from tests.support.tiny_training import *  # noqa: F403
