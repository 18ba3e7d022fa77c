"""The Weights & Biases destination: the real client, on a thread of its own."""

from telemetry.backends.wandb.backend import WandbBackend

__all__ = ["WandbBackend"]
