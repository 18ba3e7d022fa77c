"""The TensorBoard destination: event files of its own, and the command that opens them."""

from telemetry.backends.tensorboard.backend import TensorBoardBackend, launch_command

__all__ = ["TensorBoardBackend", "launch_command"]
