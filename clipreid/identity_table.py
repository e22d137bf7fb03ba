"""Tables with a row per identity, in row blocks: every rank holds its own, and lends rows to the others.

    labels of a batch ──▶ [identity_table: fetch] ──▶ rows ──▶ text features, losses
    optimizer ◀── [lent_gradient] ◀── backward

Prompt tokens, classifiers and text features have one row for each of the N identities. Rank r of R holds rows
N·r/R … N·(r+1)/R, whatever the batch: value, gradient and Adam's moments of a row exist there and nowhere else. One
process is the case of one block. What crosses ranks is the batch's rows, never N.

N = identities, R = ranks
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clipreid.peers import ALONE, Peers, rank_slice
from clipreid.to_device import to_device


class _Exchange(NamedTuple):
    """Which rows go where, for one rank."""

    rows: np.ndarray
    """Of this rank's block, for rank 0, then for rank 1, …"""
    send: list[int]
    """How many for each rank."""
    receive: list[int]
    """How many from each."""
    place: np.ndarray
    """Of each identity that this rank wants, among what it receives."""


class IdentityTable:
    """One rank's rows of a table of N."""

    def __init__(self, name: str, num_identities: int, block: Tensor, peers: Peers = ALONE) -> None:
        """name: as files of weights call it. block: float [n, ...], the rows `own` of this rank."""
        self.name, self.num_identities = name, num_identities
        self.rank, self.world_size = peers.rank, peers.world_size
        own = rank_slice(num_identities, peers.rank, peers.world_size)
        self.own = range(own.start, own.stop)
        """Identities whose rows are here."""
        assert len(block) == len(self.own), f"{name}: {len(block)} rows for {self.own}"
        self.block = nn.Parameter(block)
        self._bounds = num_identities * np.arange(1, peers.world_size) // peers.world_size
        """First identities of ranks 1, 2, …"""
        self._lent: list[tuple[Tensor, Tensor]] = []
        """Row numbers in the block, on the CPU, and the copies of these rows that a backward pass leaves gradients
        at."""

    @classmethod
    def frozen(cls, name: str, num_identities: int, block: Tensor, peers: Peers = ALONE) -> "IdentityTable":
        """Of rows that do not learn."""
        table = cls(name, num_identities, block, peers)
        table.block.requires_grad_(False)
        return table

    @property
    def row_numel(self) -> int:
        """Elements of one row."""
        return self.block.shape[1:].numel()

    def to(self, place: torch.device | torch.dtype) -> "IdentityTable":
        """Moves the block, in place."""
        self.block = nn.Parameter(self.block.detach().to(place), self.block.requires_grad)
        return self

    def fetch(self, wanted: Sequence[Tensor], peers: Peers = ALONE) -> Tensor:
        """The rows that this rank wants from their owners, while it lends its own.

        wanted: for every rank the identities that it wants, int64 on the CPU, the same R entries on all ranks; in any
        order, also repeated or none. Returns [len(wanted[rank]), ...] in that order, differentiable: the gradients
        go back to the owners, where `lent_gradient` finds them.
        """
        plan = self._plan([labels.numpy() for labels in wanted])
        received = peers.all_to_all(self._lend(torch.from_numpy(plan.rows)), plan.send, plan.receive)
        return received[to_device(torch.from_numpy(plan.place), received.device)]

    def _plan(self, wanted: list[np.ndarray]) -> "_Exchange":
        """What each rank wants, in the order of its owners, so that what it receives is in the order of identities."""
        by_rank = np.repeat(np.arange(self.world_size), [len(labels) for labels in wanted])
        keys = np.sort(by_rank * self.num_identities + np.concatenate(wanted))
        by_rank, labels = np.divmod(keys, self.num_identities)
        owner = np.searchsorted(self._bounds, labels, side="right")
        mine, for_me = owner == self.rank, by_rank == self.rank
        return _Exchange(
            rows=labels[mine] - self.own.start,
            send=np.bincount(by_rank[mine], minlength=self.world_size).tolist(),
            receive=np.bincount(owner[for_me], minlength=self.world_size).tolist(),
            place=wanted[self.rank].argsort(kind="stable").argsort(kind="stable"),
        )

    def _lend(self, rows: Tensor) -> Tensor:
        """Copies of some rows, so that their gradients take no room for the rest of the block."""
        lent = self.block.detach()[to_device(rows, self.block.device)]
        if self.block.requires_grad and torch.is_grad_enabled():
            lent.requires_grad_()
            self._lent.append((rows, lent))
        return lent

    @torch.no_grad()
    def lent_gradient(self) -> tuple[Tensor, Tensor]:
        """What came back for the rows that were lent in this step: row numbers of the block, int64 [k] on the CPU, in
        any order, also repeated or none, and a gradient for each [k, ...], which add up.

        The loss counts as the mean over ranks of theirs, so a gradient is what came back over R. Where the block itself
        took part in a loss (`identity_softmax`), its own gradient is beside these.
        """
        returned = [(rows, lent.grad / self.world_size) for rows, lent in self._lent if lent.grad is not None]
        if not returned:
            return torch.empty(0, dtype=torch.int64), self.block.new_empty(0, *self.block.shape[1:])
        rows, gradients = zip(*returned, strict=True)
        return torch.cat(rows), torch.cat(gradients)

    def clear_gradient(self) -> None:
        """After a step."""
        self._lent, self.block.grad = [], None


@dataclass
class IdentityTables:
    """What learns and has a row per identity."""

    classifier: IdentityTable
    """[N, width of img]: of the image feature."""
    classifier_proj: IdentityTable
    """[N, D]: of the projected feature."""
    tokens: IdentityTable | None
    """[N, M, W]: of the prompts; None without a text side."""

    @property
    def classifiers(self) -> tuple[IdentityTable, IdentityTable]:
        return self.classifier, self.classifier_proj

    def __iter__(self) -> Iterator[IdentityTable]:
        yield from self.classifiers
        if self.tokens is not None:
            yield self.tokens

    def to(self, place: torch.device | torch.dtype) -> "IdentityTables":
        for table in self:
            table.to(place)
        return self
