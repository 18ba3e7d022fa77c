"""The door for Lightning: ``Trainer(callbacks=[TelemetryCallback(logging_steps=100)])``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from telemetry.loop import Telemetry


class TelemetryCallback(Callback):
    """Watches the model that a ``LightningModule`` trains, with automatic optimization.

    Args:
        model: the attribute of the module that holds what its ``training_step`` calls; where there is none, the module
            itself is watched.
        output_dir: where the run keeps its files; by default the trainer's ``default_root_dir``.
        kwargs: as of :class:`telemetry.loop.Telemetry`.

    Attributes:
        telemetry: the loop's, while training runs.
    """

    def __init__(self, model: str = "model", output_dir: str | Path | None = None, **kwargs: Any) -> None:
        self._attribute = model
        self._output_dir = output_dir
        self._arguments = kwargs
        self._open = False
        self.telemetry: Telemetry | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = getattr(pl_module, self._attribute, None)
        self.telemetry = Telemetry(
            model if isinstance(model, nn.Module) else pl_module,
            self._output_dir or trainer.default_root_dir,
            starting_step=trainer.global_step,
            **self._arguments,
        ).__enter__()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.telemetry is not None and not self._open:
            self._open = True
            self.telemetry.begin_step()
        if self.telemetry is not None and isinstance(batch, Mapping):
            self.telemetry.microbatch(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        # Lightning calls the optimizer's step around the passes, and this after them, before clipping.
        if self.telemetry is not None:
            self.telemetry.gradients()
            self.telemetry.before_update(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.telemetry is not None and trainer.global_step > self.telemetry.steps:
            self._open = False
            self.telemetry.after_update(trainer.optimizers[0])
            self.telemetry.end_step()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.telemetry is not None:
            self.telemetry.evaluated(trainer.val_dataloaders)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        telemetry, self.telemetry, self._open = self.telemetry, None, False
        if telemetry is not None:
            telemetry.__exit__()
