"""An identity table that learns, with its Adam: this rank's rows of value and moments.

    backward ── gradients of rows ──▶ [trained_table: step] ──▶ IdentityTable

Every row moves in every step, also those of identities that are not in the batch: that is the published Adam with L2
decay, in one pass over memory. It is taken in pieces of some rows, for the optimizer a parameter each: where no row of
a piece was in the batch, its gradient is zero, and one piece of zeros serves them all. So a table that only lends rows
has no gradient of its own size, and the step is bit for bit that of the whole table.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from clipreid.identity_table import IdentityTable
from clipreid.optim import adam
from clipreid.to_device import to_device
from cluster.training.pieces import MOMENTS, Piece

PIECE_ELEMENTS = 1 << 16
"""Of a piece, about: its gradient stays in a processor's cache."""
ALIGNED_ROWS = 16
"""Pieces are multiples of it, so that their elements are taken in the same vectors as those of the whole table."""


class TrainedTable:
    """One table of a stage."""

    def __init__(self, name: str, table: IdentityTable, *, weight_decay: float, lr_factor: float = 1.0):
        """name: in checkpoints. lr_factor: the stage's learning rate is multiplied by it."""
        self.name, self.table = name, table
        block = table.block.detach()
        self._rows = max(PIECE_ELEMENTS // table.row_numel // ALIGNED_ROWS, 1) * ALIGNED_ROWS
        self._pieces = [nn.Parameter(piece) for piece in block.split(self._rows)]
        self._moments = {moment: torch.zeros_like(block) for moment in MOMENTS}
        self._room = self._zeros(1)
        """Gradients of pieces with rows that were lent, behind a piece of zeros; between steps all of it is zero."""
        group = {"params": self._pieces, "names": [name], "weight_decay": weight_decay, "lr_factor": lr_factor}
        self.adam = adam([group])
        self._begin_adam()

    @property
    def block(self) -> Tensor:
        return self.table.block

    @property
    def numel(self) -> int:
        """Of all ranks' rows."""
        return self.table.num_identities * self.table.row_numel

    @torch.no_grad()
    def step(self) -> None:
        """Move every row by what came back for those lent, and by the block's own gradient where it has one."""
        rows, gradients = self.table.lent_gradient()
        own = self.block.grad
        if own is None:
            self._step_lent(rows, gradients)
        else:
            own.index_add_(0, to_device(rows, own.device), gradients)
            self._step_by(own.split(self._rows))
        self.table.clear_gradient()

    def piece(self) -> Piece:
        """This rank's rows."""
        moments = (self._moments[moment].view(-1) for moment in MOMENTS)
        return Piece(self.name, self.table.own.start * self.table.row_numel, self.block.detach().view(-1), *moments)

    def set_steps(self, steps: int) -> None:
        for state in self.adam.state.values():
            state["step"].fill_(float(steps))

    def _begin_adam(self) -> None:
        """Its state as it makes it in the first step, with each piece's moments in those of the whole table."""
        parts = {moment: self._moments[moment].split(self._rows) for moment in MOMENTS}
        for number, piece in enumerate(self._pieces):
            step = torch.zeros((), dtype=torch.float32, device=piece.device)
            self.adam.state[piece] = {"step": step, **{moment: parts[moment][number] for moment in MOMENTS}}

    def _step_lent(self, rows: Tensor, gradients: Tensor) -> None:
        row = rows.numpy()  # on the host: no GPU is waited for
        pieces, which = np.unique(row // self._rows, return_inverse=True)
        if len(self._room) < (1 + len(pieces)) * self._rows:
            self._room = self._zeros(1 + len(pieces))
        place = to_device(torch.from_numpy((1 + which) * self._rows + row % self._rows), self._room.device)
        self._room.index_add_(0, place, gradients)
        zeros, *lent = self._room.split(self._rows)
        of_lent = dict(zip(pieces.tolist(), lent, strict=False))
        self._step_by(of_lent.get(number, zeros) for number in range(len(self._pieces)))
        self._room.index_fill_(0, place, 0)

    def _step_by(self, gradients: Iterable[Tensor]) -> None:
        """gradients: of every piece; that of the last may go on behind its rows."""
        for piece, gradient in zip(self._pieces, gradients, strict=True):
            piece.grad = gradient[: len(piece)]
        self.adam.step()
        self.adam.zero_grad()

    def _zeros(self, pieces: int) -> Tensor:
        return self.block.new_zeros(pieces * self._rows, *self.block.shape[1:]).detach()
