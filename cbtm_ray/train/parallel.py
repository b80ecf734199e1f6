"""One model trained by several workers that share each batch: PyTorch's DDP, or FSDP2 where a model is too large for one.

The workers are those of the process group that the caller has set up; without one, or alone in it, there is nothing to share.
What takes a second to import, and few runs have a use for, is imported inside the functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from cbtm_ray.errors import UserError
from cbtm_ray.train.loss import TokenLoss

if TYPE_CHECKING:  # a run's controller imports this file, and has no use for what it takes seconds to import
    from transformers import PreTrainedModel


def workers() -> int:
    """How many workers share a batch."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def shared_loss(token_loss: TokenLoss, parallel: str) -> torch.nn.Module:
    """The same loss for several workers: its gradients become means over all of them.

    Args:
        parallel: 'ddp', every worker holds the model; 'fsdp', every worker holds its part of each layer's parameters,
            gradients and moments. The model's parameters are then others than before.
    """
    if parallel == "ddp":
        return DistributedDataParallel(token_loss, forward_sync_buffers=False)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = token_loss.model
    mesh = init_device_mesh(model.device.type, (workers(),))
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module, mesh=mesh)
    sharded: Any = fully_shard(token_loss, mesh=mesh)
    return sharded


def reducing(loss: torch.nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Where the gradients of one part of a batch are computed: DDP sends them once, with those of the last part."""
    return loss.no_sync() if isinstance(loss, DistributedDataParallel) and not last else contextlib.nullcontext()


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean over the workers."""
    if workers() == 1:
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / workers()


def any_of(own: bool, device: torch.device) -> bool:
    """Whether it is so for one of the workers; every worker gets the same answer."""
    return own if workers() == 1 else bool(mean(torch.tensor(float(own), device=device)) > 0)


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """A UserError that one worker meets in the block is raised by all of them at its end.

    Else that worker would go on to other work while the rest waited for it in their next exchange. All workers must enter
    the block, and none may exchange anything in it. Any other exception is raised by its worker at once, whose caller ends
    the group.
    """
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    messages: list[str | None] = [str(own) if own else None] * workers()
    if workers() > 1:
        distributed.all_gather_object(messages, messages[0])
    if own:
        raise own
    if theirs := next(filter(None, messages), None):
        raise UserError(theirs)


def all_finite(model: PreTrainedModel) -> bool:
    """Whether every weight is a finite number; every worker gets the same answer."""
    finite = all(bool(torch.isfinite(_local(p)).all()) for p in model.parameters())
    return not any_of(not finite, model.device)


def state_of(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and optimizer by the parameters' names, whole, whatever the number of workers. Worker 0 has them, if many."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_state(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, weights: dict[str, Any], moments: dict[str, Any]
) -> None:
    """Take what `state_of` gave, on any number of workers."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)


def whole_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model on the CPU with all its weights; worker 0 may use it, all must call."""
    if all(_local(p) is p for p in model.parameters()):
        return model.cpu()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = type(model)(model.config)
    if rank() == 0:
        whole.load_state_dict(weights)
    return whole


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This worker's part of a parameter that FSDP has split; any other parameter itself."""
    part: Callable[[], torch.Tensor] | None = getattr(parameter, "to_local", None)
    return part() if part else parameter
