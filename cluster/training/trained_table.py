"""An identity table that learns, with its Adam: this rank's rows of value and moments.

    backward ── gradients of rows ──▶ [trained_table: step] ──▶ IdentityTable

Every row moves in every step, also those of identities that are not in the batch: that is the published Adam with L2
decay, in one pass over memory.
"""

import torch

from clipreid.identity_table import IdentityTable
from clipreid.optim import adam
from cluster.training.pieces import MOMENTS, Piece


class TrainedTable:
    """One table of a stage."""

    def __init__(self, name: str, table: IdentityTable, *, weight_decay: float, lr_factor: float = 1.0):
        """name: in checkpoints. lr_factor: the stage's learning rate is multiplied by it."""
        self.name, self.table = name, table
        group = {"params": [table.block], "names": [name], "weight_decay": weight_decay, "lr_factor": lr_factor}
        self.adam = adam([group])

    @property
    def block(self) -> torch.Tensor:
        return self.table.block

    @property
    def numel(self) -> int:
        """Of all ranks' rows."""
        return self.table.num_identities * self.table.row_numel

    def step(self) -> None:
        self.table.collect_gradient()
        self.adam.step()
        self.table.clear_gradient()

    def piece(self) -> Piece:
        """This rank's rows."""
        moments = (self._state()[moment].view(-1) for moment in MOMENTS)
        return Piece(self.name, self.table.own.start * self.table.row_numel, self.block.detach().view(-1), *moments)

    def set_steps(self, steps: int) -> None:
        self._state()["step"].fill_(float(steps))

    def _state(self) -> dict[str, torch.Tensor]:
        """As Adam makes it in the first step."""
        state = self.adam.state[self.block]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=self.block.device)
            state |= {moment: torch.zeros_like(self.block.detach()) for moment in MOMENTS}
        return state
