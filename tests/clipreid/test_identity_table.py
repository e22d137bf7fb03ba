"""Tables in row blocks: any rank gets the rows it asks for, and their gradients come to the owner and nowhere else."""

import pytest
import torch

from clipreid.identity_table import IdentityTable
from clipreid.peers import rank_slice
from tests.helpers.rank_threads import run_ranks
from tests.helpers.tables import gradient_of, table_of

ROWS = torch.arange(22.0, dtype=torch.float64).view(11, 2)


def wanted_by(world_size, seed):
    """Unequal numbers of identities in any order, repeated, and none for some ranks."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 6, (world_size,), generator=generator)
    return [torch.randint(11, (int(size),), generator=generator) for size in sizes]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 13])
def test_every_rank_gets_the_rows_that_it_wants_and_owners_get_their_gradients(world_size, seed):
    wanted = wanted_by(world_size, seed)
    factors = [torch.arange(1.0, 1 + len(labels), dtype=torch.float64)[:, None] for labels in wanted]

    def one_rank(peers):
        table = table_of(ROWS, peers)
        return table, table.fetch(wanted, peers)

    tables, fetched = zip(*run_ranks(world_size, one_rank), strict=True)
    for labels, rows in zip(wanted, fetched, strict=True):
        assert torch.equal(rows, ROWS[labels])
    sum((rows * factor).sum() for rows, factor in zip(fetched, factors, strict=True)).backward()
    expected = torch.zeros_like(ROWS)
    for labels, factor in zip(wanted, factors, strict=True):
        expected.index_add_(0, labels, factor.expand(-1, 2) / world_size)
    torch.testing.assert_close(torch.cat([gradient_of(table) for table in tables]), expected)


def test_blocks_are_a_function_of_the_numbers_alone_and_cover_every_row_once():
    for identities in (1, 7, 8, 100):
        for world_size in (1, 3, 8, 9):
            tables = run_ranks(world_size, lambda p, n=identities: table_of(torch.zeros(n, 2), p))
            assert [row for table in tables for row in table.own] == list(range(identities))
            parts = [rank_slice(identities, rank, world_size) for rank in range(world_size)]
            assert [(t.own.start, t.own.stop) for t in tables] == [(part.start, part.stop) for part in parts]


def test_gradients_are_held_for_lent_rows_only_and_forgotten_after_a_step():
    table = table_of(ROWS)
    for wanted in ([3, 9], [4]):
        table.fetch([torch.tensor(wanted)]).sum().backward()
        rows, gradients = table.lent_gradient()
        assert rows.tolist() == wanted and gradients.shape == (len(wanted), 2) and table.block.grad is None
        table.clear_gradient()
    assert not gradient_of(table).any()


def test_rows_that_do_not_learn_and_those_without_grad_leave_nothing_behind():
    frozen = table_of(ROWS, frozen=True)
    assert not frozen.fetch([torch.tensor([1])]).requires_grad
    table = table_of(ROWS)
    with torch.no_grad():
        assert not table.fetch([torch.tensor([1])]).requires_grad
    for each in (frozen, table):
        assert not len(each.lent_gradient()[0])


def test_a_block_of_the_wrong_length_is_refused():
    with pytest.raises(AssertionError, match="10 rows for range"):
        IdentityTable("classifier.weight", 11, torch.zeros(10, 2))
