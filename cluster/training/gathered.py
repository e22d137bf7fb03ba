"""Whole tables in a file, though no rank has them: rank 0 writes, and each rank sends the rows that are asked for.

IdentityTable of every rank ──▶ [gathered] ──▶ stage1.safetensors, model.safetensors
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from clipreid.identity_table import IdentityTable
from clipreid.peers import rank_slice
from clipreid.weights.sealed import Stored
from clipreid.weights.types import TYPES, bytes_of
from cluster.ranks.team import Team

PIECE_ELEMENTS = 1 << 22
"""Sent at a time."""


class Request(NamedTuple):
    """What rank 0 asks for: rows first … last of the owner's block of a table."""

    table: int
    owner: int
    first: int
    last: int


class Outcome(NamedTuple):
    """How it ended."""

    error: Exception | None


def on_first_with_tables(
    team: Team, tables: Sequence[IdentityTable], work: Callable[[Mapping[str, Stored]], None], operation: str
) -> None:
    """`work(whole tables by name)` on rank 0, which holds no more than a piece of the other ranks' rows at a time.

    All ranks call this together; what `work` raises is raised on every rank.
    """
    if team.is_first:
        try:
            work({table.name: _whole(team, tables, number, operation) for number, table in enumerate(tables)})
            outcome = Outcome(None)
        except Exception as error:
            outcome = Outcome(error)
        team.broadcast_object(outcome, operation)
    else:
        while isinstance(asked := team.broadcast_object(None, operation), Request):
            _send(team, tables, asked, operation)
        outcome = asked
    if outcome.error is not None:
        raise outcome.error


def _whole(team: Team, tables: Sequence[IdentityTable], number: int, operation: str) -> Stored:
    block = tables[number].block
    shape = (tables[number].num_identities, *block.shape[1:])
    return Stored(TYPES[block.dtype], shape, lambda: _pieces(team, tables, number, operation))


def _pieces(team: Team, tables: Sequence[IdentityTable], number: int, operation: str) -> Iterator[memoryview]:
    """On rank 0: a whole table, rank after rank."""
    table = tables[number]
    rows = max(1, PIECE_ELEMENTS // table.row_numel)
    for owner in range(team.world_size):
        own = rank_slice(table.num_identities, owner, team.world_size)
        for first in range(0, own.stop - own.start, rows):
            request = Request(number, owner, first, min(first + rows, own.stop - own.start))
            if owner:
                team.broadcast_object(request, operation)
                yield bytes_of(_send(team, tables, request, operation))
            else:
                yield bytes_of(table.block[first : request.last])


def _send(team: Team, tables: Sequence[IdentityTable], request: Request, operation: str) -> Tensor:
    """The rows asked for, on rank 0; no rows elsewhere."""
    count, block = request.last - request.first, tables[request.table].block.detach()
    is_owner = team.rank == request.owner
    rows = block[request.first : request.last] if is_owner else block[:0]
    send = [count if is_owner and rank == 0 else 0 for rank in range(team.world_size)]
    receive = [count if team.is_first and rank == request.owner else 0 for rank in range(team.world_size)]
    return team.patiently(operation).all_to_all(rows, send, receive)
