"""What a stage trains, as one thing with a step: a module under DeepSpeed, and identity tables of which each rank has
its own rows.

    stage ──▶ [Engine: Replicated, TrainedTables] ── pieces ──▶ checkpoint

DeepSpeed keeps what is the same on every rank: the image encoder with side information and necks, whose gradients it
averages and whose optimizer state it splits (ZeRO). The tables (`clipreid.identity_table`) are in parts already and
have no gradient to reduce, so neither ZeRO's settings nor clipping reach them. Stage 1 trains tables alone: DeepSpeed
has no part in it.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipreid.optim import adam as make_adam
from cluster.errors import TrainingError
from cluster.ranks.team import PATIENCE, Team
from cluster.training.pieces import MOMENTS, Piece, Slot, slots
from cluster.training.trained_table import TrainedTable

BUCKET_ELEMENTS = 1 << 24
"""Of gradients reduced at a time: 64 MB fill the links, and the first are on their way while most of the backward pass
is still to come."""


def prepare_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed with what a CPU needs set first, and its chatter off."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # A single process has nobody to set it.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    if device.type == "cpu":
        # Otherwise the first initialize compiles a shared-memory operator for half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def zero_settings(stage: int, team: Team) -> dict[str, Any]:
    settings: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET_ELEMENTS}
    if stage == 0:
        return settings
    # Behind the backward pass by default. gloo has no stream of its own to reduce on. DeepSpeed ends an overlapped
    # backward pass with a host-device synchronisation, which one process, with nothing to send, is spared.
    settings["overlap_comm"] = team.device.type == "cuda" and team.world_size > 1
    # The norm is of no use without clipping. Reading it costs a host-device synchronisation in every step, and where it
    # is not finite DeepSpeed leaves the step out without a word.
    return settings | {"compute_grad_norm": False}


class Engine:
    """All that a stage trains."""

    def __init__(self, *, replicated: "Replicated | None" = None, tables: Sequence[TrainedTable] = ()):
        self.replicated, self.tables = replicated, tables
        self.steps = 0
        """Optimizer steps taken, over all epochs of the stage."""

    def __call__(self, *inputs: Any) -> Any:
        """Of the replicated module."""
        assert self.replicated is not None
        return self.replicated(*inputs)

    def backward(self, loss: Tensor) -> None:
        if self.replicated is None:
            loss.backward()
        else:
            self.replicated.backward(loss)

    def step(self) -> None:
        """Move what trains by its gradients, of the mean over ranks of their losses."""
        if self.replicated is not None:
            self.replicated.step()
        for table in self.tables:
            table.step()
        self.steps += 1

    def set_lr(self, lr: float) -> None:
        optimizers = [table.adam for table in self.tables]
        if self.replicated is not None:
            optimizers.append(self.replicated.adam)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_factor"]

    def remember_buffers(self) -> None:
        """Keep a copy of the running statistics, which a forward pass changes before its loss is known."""
        if self.replicated is not None:
            self.replicated.remember_buffers()

    def restore_buffers(self) -> None:
        """Undo what the forward pass since `remember_buffers` did to the running statistics."""
        if self.replicated is not None:
            self.replicated.restore_buffers()

    @property
    def zero_stage(self) -> int:
        """0 where nothing is replicated."""
        return 0 if self.replicated is None else self.replicated.zero_stage

    @property
    def module(self) -> nn.Module | None:
        """The replicated module."""
        return None if self.replicated is None else self.replicated.module

    def is_finite(self) -> bool:
        """Whether every parameter here is."""
        parameters = [table.block for table in self.tables] + (list(self.module.parameters()) if self.module else [])
        return all(bool(parameter.isfinite().all()) for parameter in parameters)

    def numels(self) -> dict[str, int]:
        """Elements of every trained parameter, over all ranks."""
        own = self.replicated.numels() if self.replicated else {}
        return own | {table.name: table.numel for table in self.tables}

    def slots(self, rank: int) -> dict[tuple[str, str], list[Slot]]:
        """Where a checkpoint's elements belong on this rank, by parameter and key: every element that it uses."""
        places = slots(table.piece() for table in self.tables)
        if self.replicated is not None:
            places |= self.replicated.slots(rank)
        return places

    def loaded(self, steps: int) -> None:
        """The slots are filled: `steps` steps were taken."""
        for table in self.tables:
            table.set_steps(steps)
        if self.replicated is not None:
            self.replicated.loaded(steps)
        self.steps = steps

    def close(self) -> None:
        if self.replicated is not None:
            self.replicated.close()


class Replicated:
    """One module under DeepSpeed, the same on every rank, and its Adam.

    DeepSpeed's own checkpoints of ZeRO 1 and 2 fit only the number of workers that wrote them. Here the state is taken
    out as named pieces of each parameter (value and Adam's two moments), and put back from any set of pieces.
    """

    def __init__(
        self, module: nn.Module, groups: list[dict[str, Any]], *, team: Team, zero_stage: int, prefix: str = ""
    ):
        """groups: of `clipreid.optim`, each with its `lr_factor`. prefix: before the names in checkpoints."""
        self.module = module.to(team.device)
        self.zero_stage, self.prefix = zero_stage, prefix
        self._settings = [{k: g[k] for k in ("betas", "eps", "weight_decay") if k in g} for g in groups]
        adam = make_adam(groups)
        deepspeed = prepare_deepspeed(team.device)
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # Batches are ours; DeepSpeed only wants a number.
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # Its default is 1.0, the paper clips nothing.
            "zero_optimization": zero_settings(zero_stage, team),
            # By default it waits for the GPU twice a step, to time what the run's own log times.
            "timers": {"throughput": {"enabled": False, "synchronized": False}},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**40,
        }
        with team.within("start DeepSpeed", PATIENCE):
            deepspeed.init_distributed(dist_backend="nccl" if team.device.type == "cuda" else "gloo", verbose=False)
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=self.module, optimizer=adam, config=settings
            )
        self._remembered: list[tuple[list[Tensor], list[Tensor]]] = []

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        """Move the parameters by the gradients, averaged over ranks."""
        self._engine.step()

    def remember_buffers(self) -> None:
        if not self._remembered:
            alike: dict[torch.dtype, list[Tensor]] = {}  # One kernel copies many tensors of one type.
            for buffer in self.module.buffers():
                alike.setdefault(buffer.dtype, []).append(buffer)
            self._remembered = [(buffers, [b.clone() for b in buffers]) for buffers in alike.values()]
        for buffers, copies in self._remembered:
            torch._foreach_copy_(copies, buffers)

    def restore_buffers(self) -> None:
        for buffers, copies in self._remembered:
            torch._foreach_copy_(buffers, copies)

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and buffers; the module stays usable."""
        self._engine.destroy()

    @property
    def adam(self) -> torch.optim.Adam:
        return getattr(self._optimizer, "optimizer", self._optimizer) if self.zero_stage else self._base

    @property
    def _base(self) -> torch.optim.Adam:
        return self._engine.basic_optimizer

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """By their names in checkpoints."""
        named = self.module.named_parameters()
        return ((self.prefix + name, parameter) for name, parameter in named if parameter.requires_grad)

    def numels(self) -> dict[str, int]:
        return {name: parameter.numel() for name, parameter in self.trained()}

    def buffers(self) -> dict[str, Tensor]:
        """Running statistics and their like, by their names in checkpoints: what a state_dict holds of them."""
        state = self.module.state_dict(keep_vars=True)
        return {self.prefix + name: buffer for name, buffer in self.module.named_buffers() if name in state}

    def pieces(self, rank: int) -> Iterator[Piece]:
        """What this rank's optimizer owns. Together the ranks' pieces cover each parameter exactly once."""
        if self.zero_stage > 0 or rank == 0:  # Without ZeRO every rank holds the same: one of them speaks for all.
            yield from self._own_pieces()

    def _own_pieces(self) -> Iterator[Piece]:
        for name, parameter in self.trained():
            if self.zero_stage == 0:
                state = self._moments(parameter)
                yield Piece(name, 0, parameter.detach().flatten(), *(state[m].flatten() for m in MOMENTS))
            elif (mapping := cast(Any, parameter)._hp_mapping) is not None:  # An attribute that DeepSpeed adds.
                at = mapping.hp_fragment_address
                flat = self.adam.param_groups[mapping.param_group_index]["params"][0]
                state = self._moments(flat)
                moments = (state[m].narrow(0, at.start, at.numel) for m in MOMENTS)
                yield Piece(name, mapping.lp_fragment_address.start, mapping.hp_fragment.detach(), *moments)

    def slots(self, rank: int) -> dict[tuple[str, str], list[Slot]]:
        """As of `Engine`: the whole of every parameter, which each rank computes with, and what its optimizer owns."""
        places = slots(self._own_pieces())
        for name, parameter in self.trained():
            places.setdefault((name, "value"), []).append(Slot(0, parameter.detach().view(-1)))
        return places

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Adam's state of one (flat) parameter, made as Adam would make it if no step was taken yet."""
        state = self.adam.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state |= {m: torch.zeros_like(parameter, memory_format=torch.preserve_format) for m in MOMENTS}
        return state

    def loaded(self, steps: int) -> None:
        for state in self.adam.state.values():
            state["step"].fill_(float(steps))
        self._check_settings()

    def _check_settings(self) -> None:
        """The optimizer's settings are the configuration's, whatever was loaded."""
        for group, expected in zip(self.adam.param_groups, self._settings, strict=True):
            for key, value in expected.items():
                if group[key] != value:
                    raise TrainingError(f"optimizer has {key} {group[key]} after loading, the settings say {value}")
