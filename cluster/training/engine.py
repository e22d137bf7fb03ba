"""DeepSpeed around one module and its Adam: averaged gradients, ZeRO, and a state that no world size owns.

    stage ── module, parameter groups ──▶ [engine] ── named fragments ──▶ checkpoint

DeepSpeed's own checkpoints of ZeRO 1 and 2 fit only the number of workers that wrote them. Here the state is
taken out as named pieces of each parameter (value and Adam's two moments), and put back from any set of pieces.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipreid.optim import adam as make_adam
from cluster.errors import TrainingError
from cluster.ranks.team import PATIENCE, Team

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Fragment:
    """The piece of one parameter that this rank's optimizer owns: flat elements start … start + value.numel()."""

    name: str
    start: int
    value: Tensor
    """float32 master copy, flat."""
    exp_avg: Tensor
    exp_avg_sq: Tensor


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


def _zero_settings(stage: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 50_000_000}
    # The norm is of no use without clipping. Reading it costs a host-device synchronisation in every step, and where it
    # is not finite DeepSpeed leaves the step out without a word.
    return settings if stage == 0 else settings | {"compute_grad_norm": False}


class Engine:
    """One module under DeepSpeed. `groups` come from `clipreid.optim`, each with its `lr_factor`."""

    def __init__(self, module: nn.Module, groups: list[dict[str, Any]], *, team: Team, zero_stage: int):
        self.module = module.to(team.device)
        self.zero_stage = zero_stage
        self._groups = groups
        self._settings = [{k: g[k] for k in ("betas", "eps", "weight_decay") if k in g} for g in groups]
        adam = make_adam(groups, fused=team.device.type == "cuda")
        deepspeed = prepare_deepspeed(team.device)
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # Batches are ours; DeepSpeed only wants a number.
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # Its default is 1.0, the paper clips nothing.
            "zero_optimization": _zero_settings(zero_stage),
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
        self.steps = 0
        """Optimizer steps taken, over all epochs of the stage."""

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        """Move the parameters by the gradients, averaged over ranks."""
        self._engine.step()
        self.steps += 1

    def remember_buffers(self) -> None:
        """Keep a copy of the running statistics, which a forward pass changes before its loss is known."""
        if not self._remembered:
            alike: dict[torch.dtype, list[Tensor]] = {}  # One kernel copies many tensors of one type.
            for buffer in self.module.buffers():
                alike.setdefault(buffer.dtype, []).append(buffer)
            self._remembered = [(buffers, [b.clone() for b in buffers]) for buffers in alike.values()]
        for buffers, copies in self._remembered:
            torch._foreach_copy_(copies, buffers)

    def restore_buffers(self) -> None:
        """Undo what the forward pass since `remember_buffers` did to the running statistics."""
        for buffers, copies in self._remembered:
            torch._foreach_copy_(buffers, copies)

    def set_lr(self, lr: float) -> None:
        for group in self._adam.param_groups:
            group["lr"] = lr * group["lr_factor"]

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and buffers; the module stays usable."""
        self._engine.destroy()

    @property
    def _adam(self) -> torch.optim.Adam:
        return getattr(self._optimizer, "optimizer", self._optimizer) if self.zero_stage else self._base

    @property
    def _base(self) -> torch.optim.Adam:
        return self._engine.basic_optimizer

    def fragments(self, rank: int) -> Iterator[Fragment]:
        """This rank's pieces of all trained parameters. Together the ranks' pieces cover each one exactly once."""
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.zero_stage == 0:
                if rank == 0:  # Every rank holds the same state: one of them speaks for all.
                    state = self._moments(parameter)
                    yield Fragment(name, 0, parameter.detach().flatten(), *(state[m].flatten() for m in MOMENTS))
            elif (mapping := cast(Any, parameter)._hp_mapping) is not None:  # An attribute that DeepSpeed adds.
                at = mapping.hp_fragment_address
                flat = self._adam.param_groups[mapping.param_group_index]["params"][0]
                state = self._moments(flat)
                moments = (state[m].narrow(0, at.start, at.numel) for m in MOMENTS)
                yield Fragment(name, mapping.lp_fragment_address.start, mapping.hp_fragment.detach(), *moments)

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Adam's state of one (flat) parameter, made as Adam would make it if no step was taken yet."""
        state = self._adam.state[parameter]
        if not state:
            fused = self._adam.defaults["fused"]
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
            state |= {m: torch.zeros_like(parameter, memory_format=torch.preserve_format) for m in MOMENTS}
        return state

    @torch.no_grad()
    def load(self, full: dict[str, dict[str, Tensor]], steps: int, rank: int) -> None:
        """Take on a state: per parameter name flat float32 "value", "exp_avg" and "exp_avg_sq", and Adam's step count.

        Raises TrainingError where a trained parameter is missing or has another size.
        """
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                if name not in full or full[name]["value"].numel() != parameter.numel():
                    held = full[name]["value"].numel() if name in full else "nothing"
                    raise TrainingError(
                        f"checkpoint holds {held} for parameter {name} of {parameter.numel()} elements: "
                        "it is of another model"
                    )
                parameter.copy_(full[name]["value"].view_as(parameter))
        # Every rank's own fragments, also under ZeRO 0, where each holds all of them.
        for piece in self.fragments(rank=0 if self.zero_stage == 0 else rank):
            elements = slice(piece.start, piece.start + piece.value.numel())
            for key in ("value", *MOMENTS):
                getattr(piece, key).copy_(full[piece.name][key][elements])
        for state in self._adam.state.values():
            state["step"].fill_(float(steps))
        self.steps = steps
        self._check_settings()

    def _check_settings(self) -> None:
        """The optimizer's settings are the configuration's, whatever was loaded."""
        for group, expected in zip(self._adam.param_groups, self._settings, strict=True):
            for key, value in expected.items():
                if group[key] != value:
                    raise TrainingError(f"optimizer has {key} {group[key]} after loading, the settings say {value}")
