"""Tables move bit for bit as under Adam with a gradient of the whole table, which they do without."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clipreid.optim import adam
from cluster.training.pieces import MOMENTS
from cluster.training.trained_table import PIECE_ELEMENTS, TrainedTable
from tests.helpers.tables import gradient_of, table_of

SETTINGS = {"weight_decay": 1e-4, "lr_factor": 1.0}


def learning(rows, lr=1e-2):
    trained = TrainedTable("tokens", table_of(rows), **SETTINGS)
    trained.adam.param_groups[0]["lr"] = lr
    return trained


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("row", [(4, 128), (7,), (PIECE_ELEMENTS // 16,)])
@pytest.mark.parametrize("whole_rows", [False, True])
def test_pieces_move_as_the_whole_table_does_under_adam(row, whole_rows):
    """Rows of a multiple of the vectors' length and others; rows lent twice; with and without a gradient of all."""
    rows = random(3 * PIECE_ELEMENTS // torch.Size(row).numel() + 5, *row)
    trained, plain = learning(rows), torch.nn.Parameter(rows.clone())
    optimizer = adam([{"params": [plain], "weight_decay": SETTINGS["weight_decay"]}])
    optimizer.param_groups[0]["lr"] = 1e-2
    for step in range(4):
        wanted = torch.randint(len(rows), (9,), generator=torch.Generator().manual_seed(step)).repeat(2)
        fetched = trained.table.fetch([wanted])
        loss = (fetched * random(len(wanted), *row, seed=step)).sum()
        if whole_rows:
            loss = loss + (trained.block * random(*rows.shape, seed=step)).sum()
        loss.backward()
        plain.grad = gradient_of(trained.table)
        optimizer.step()
        trained.step()
        assert torch.equal(trained.block, plain)
        piece = trained.piece()
        assert torch.equal(piece.value, plain.flatten())
        for moment in MOMENTS:
            assert torch.equal(getattr(piece, moment), optimizer.state[plain][moment].flatten())


class Held(TorchDispatchMode):
    """Elements of the largest memory that a tensor other than `table` has while the block runs."""

    def __init__(self, table):
        super().__init__()
        self.table, self.elements = table.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != self.table:
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_no_gradient_of_a_table_s_size_is_made_where_rows_are_lent_alone():
    trained = learning(random(8 * PIECE_ELEMENTS, 1))
    with Held(trained.block) as held:
        trained.table.fetch([torch.tensor([5, 3 * PIECE_ELEMENTS])]).sum().backward()
        trained.step()
    assert trained.block.grad is None
    assert 0 < held.elements <= 3 * PIECE_ELEMENTS  # Two pieces with lent rows, one of zeros.
