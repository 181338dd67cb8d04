"""The processes of one run, as ``torchrun`` starts them: who this one is, and what all of them agree on.

Without ``torchrun`` there is one process, every function here answers for it alone, and nothing is started.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")

# Where the processes meet, while the agent that restarts them lives; None without torchrun.
_store: Any = None


def connect() -> None:
    """Find the other processes' meeting place, so that even an error of the command line is reported only once."""
    global _store
    if _store is None and distributed.is_available() and {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        _store, _, _ = next(distributed.rendezvous("env://"))


def start(device: str) -> None:
    """Join the process group, if ``torchrun`` started several processes.

    Host tensors go by gloo and those of a GPU by NCCL.

    Args:
        device: as in :func:`own_device`.

    Raises:
        ValueError: see :func:`own_device`.
    """
    connect()
    if not _several():
        return
    device = own_device(device)
    cuda = device != "cpu"
    if cuda:
        torch.cuda.set_device(device)
    # The store outlives the processes: those of the next attempt must not meet the dead.
    store = distributed.PrefixStore(f"attempt {restarts()}", _store)
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def own_device(device: str) -> str:
    """The device of this process: the GPU of its number on this machine, or ``cpu``.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``; of a single process any device, which is returned.

    Raises:
        ValueError: several processes cannot have that device, or there are fewer GPUs than processes.
    """
    if not _several():
        return device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda for several processes, got {device!r}")
    number = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and number >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"device: expected a GPU for each process of this machine, got {found} for {number + 1}")
    return "cpu" if device == "cpu" else f"cuda:{number}"


def _several() -> bool:
    return world_size() > 1 or _store is not None and int(os.environ["WORLD_SIZE"]) > 1


def stop() -> None:
    """Leave the process group, after all the others have come this far."""
    if world_size() > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes files and says things."""
    return rank() == 0


def restarts() -> int:
    """How many times ``torchrun`` has started the processes anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def remember(what: str) -> None:
    """Note something for the processes that may be started in place of these."""
    if _store is not None:
        _store.set(f"remembered/{what}", "")


def remembered(what: str) -> bool:
    """Whether these processes, or those that ran before a restart, have noted this."""
    return _store is not None and _store.check([f"remembered/{what}"])


def first_to_complain() -> bool:
    """Whether no other process has asked this since the last restart: one error stops all, and is to be said once."""
    if _store is None:
        return True
    try:
        return _store.add(f"complaints/{restarts()}", 1) == 1
    except RuntimeError:  # the store went with the process that held it
        return True


def describe(error: BaseException | str) -> str:
    """An error in one line; where it only tells that another process is gone, that."""
    line = " ".join(str(error).split())
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return line
    if isinstance(error, distributed.DistError) or any(name in line for name in ("gloo", "NCCL")):
        return f"another process of this run ended before its time ({line})"
    return line


def gather(value: T) -> list[T]:
    """The values of all processes, in their order, at all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def gather_numbers(numbers: Sequence[int]) -> list[list[int]]:
    """As :func:`gather`, of as many whole numbers in each process, and quicker."""
    own = torch.tensor(numbers, dtype=torch.int64)
    if world_size() == 1:
        return [own.tolist()]
    everyone = own.new_empty(world_size(), len(own))
    distributed.all_gather(list(everyone), own)
    return everyone.tolist()


def any_of(flag: bool) -> bool:
    """Whether it is true in some process."""
    return any(value for (value,) in gather_numbers([flag]))


def from_main(compute: Callable[[], T]) -> T:
    """What the main process computes, at all of them. Where it raises, the others end as it does."""
    if world_size() == 1:
        return compute()
    box = [compute() if is_main() else None]
    distributed.broadcast_object_list(box)
    return box[0]


def mean_(values: Tensor) -> Tensor:
    """Replace ``values`` by their mean over all processes, on their device; not finite where one of them is not."""
    if world_size() > 1:
        distributed.all_reduce(values)
        values /= world_size()
    return values


def replicate(model: nn.Module, unused_parameters: bool) -> nn.Module:
    """``model`` in ``DistributedDataParallel``: its backward leaves the mean gradient of all processes.

    Args:
        model: on this process's device; the first process's parameters replace those of the others.
        unused_parameters: whether parameters may be without a gradient.

    Returns:
        What to call instead of the model; the model itself where there is one process.
    """
    if world_size() == 1:
        return model
    known = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the older name
    return nn.parallel.DistributedDataParallel(
        model,
        **{sync: False},  # buffers are of frozen BatchNorm, and never change
        gradient_as_bucket_view=True,
        find_unused_parameters=unused_parameters,
    )
