"""Shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, on models that one thread is enough for

import trainer  # noqa: F401  (makes an installed torchaudio importable before anything imports transformers)
