"""Identity tables of given values, whole or a rank's rows of them."""

import torch

from clipreid.identity_table import IdentityTable
from clipreid.peers import ALONE, rank_slice


def table_of(rows, peers=ALONE, *, frozen=False):
    """This rank's rows of the whole table `rows`."""
    block = rows.detach()[rank_slice(len(rows), peers.rank, peers.world_size)].clone()
    make = IdentityTable.frozen if frozen else IdentityTable
    return make("table", len(rows), block, peers)


def gradient_of(table):
    """Of the whole block, after a backward pass."""
    rows, gradients = table.lent_gradient()
    own = torch.zeros_like(table.block) if table.block.grad is None else table.block.grad
    return own.detach().index_add(0, rows, gradients)
