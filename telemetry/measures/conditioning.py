"""What reference audio is worth to a model: losses of the same tokens under several references."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from telemetry.measures.token_stats import masked_totals


@dataclass(frozen=True)
class Totals:
    """Sums over counted tokens, by codebook.

    Attributes:
        loss: name → nats, float64 ``[codebooks]``.
        count: tokens, float64 ``[codebooks]``; the same for all names.
    """

    loss: dict[str, Tensor]
    count: Tensor

    def difference(self, name: str, other: str) -> Tensor:
        """Sums of one loss minus another, float64 ``[codebooks]``."""
        return self.loss[name] - self.loss[other]


def loss_totals(losses: dict[str, Tensor], counted: Tensor) -> Totals:
    """Sums of several losses over the same tokens.

    Args:
        losses: name → ``[batch, sequence, codebooks]``, nats.
        counted: bool of that shape: tokens that count.
    """
    sums = {name: masked_totals(nll, counted) for name, nll in losses.items()}
    count = next(iter(sums.values()))[1]
    return Totals({name: total for name, (total, _) in sums.items()}, count)
