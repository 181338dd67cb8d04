"""What the processes of ``test_distributed.py`` do; ``torchrun`` starts them.

torchrun ... -m tests.engine.distributed_worker everything FOLDER SCENES
torchrun ... -m tests.engine.distributed_worker train [--die RANK:STEP ...] -- ARGUMENTS OF sparse_rcnn.train
torchrun ... -m tests.engine.distributed_worker end RANK:STEP -- ARGUMENTS OF sparse_rcnn.train
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path

import torch

from sparse_rcnn import train
from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.engine import distributed
from sparse_rcnn.engine.config import TrainConfig
from sparse_rcnn.engine.evaluator import evaluate
from sparse_rcnn.engine.micro_batches import prepare_step
from sparse_rcnn.engine.optimizer import build_optimizer
from sparse_rcnn.engine.stages import evaluate_stages
from sparse_rcnn.engine.step import TrainStep
from sparse_rcnn.engine.trainer import Trainer
from sparse_rcnn.models import SparseRCNN
from sparse_rcnn.runtime import default_weights
from tests.engine.conftest import TINY
from tests.training_step import CONFIG, sample

# Counts of boxes of four images; sizes differ, so that padding does.
STEPS = {
    "plain": ({}, (3, 1, 0, 5)),
    "a rank without boxes": ({}, (3, 1, 0, 0)),
    "fewer boxes than processes": ({}, (0, 0, 1, 0)),
    "no boxes": ({}, (0, 0, 0, 0)),
    "softmax": ({"classification": "softmax"}, (3, 9, 0, 5)),
    "last stage": ({"deep_supervision": False}, (3, 1, 0, 5)),
    "denoising": ({"denoising": 12}, (3, 1, 0, 5)),
    "concat": ({"interaction": "concat"}, (3, 1, 2, 5)),
    # Of the same boxes, without features, it would be left to rounding which proposal is matched.
    "no features": ({"interaction": "plain", "proposal_init": "random"}, (3, 1, 2, 5)),
}
SIZES = ((50, 60), (64, 40), (40, 40), (90, 60))
CASES = [*((name, torch.float64) for name in STEPS), ("plain", torch.float32)]


def gradients(name: str, dtype: torch.dtype, accumulate: int) -> list[torch.Tensor]:
    """Report and gradients of a step of four images, of which this process has its part.

    Of each gradient its norm and some values: all of them, of all cases, would be gigabytes.
    """
    changes, counts = STEPS[name]
    torch.manual_seed(0)
    model = SparseRCNN(CONFIG.replace(**changes)).to(dtype=dtype, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, lr=1e-3)
    step = TrainStep(model, optimizer, clip_norm=1e9)
    found = []
    optimizer.register_step_pre_hook(lambda *_: found.extend(some(parameter.grad) for parameter in step.parameters))
    images, targets = sample(7, counts, SIZES)
    size = len(images) // distributed.world_size()
    own = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    step(*prepare_step(model, images[own], targets[own], accumulate))
    return [step.report, *found]


def some(gradient: torch.Tensor | None) -> torch.Tensor:
    if gradient is None:
        return torch.zeros(0)
    values = gradient.flatten()
    return torch.cat([values[:: 1 + len(values) // 200], values.norm().unsqueeze(0)])


def tiny_config(scenes: str, output: str, **changes) -> TrainConfig:
    """Six steps of four images."""
    values = {
        **{"data": scenes, "output": output, "backbone": "resnet18", "set": TINY, "backbone_weights": "none"},
        **{"steps": 6, "batch_size": 4, "lr": 1e-4, "warmup_steps": 4, "log_every": 2, "device": "cpu"},
    }
    return TrainConfig(**{**values, **changes})


def poisoned_run(scenes: str, output: str) -> str:
    """What a run skipped in which the second process's third step has a loss that is not a number, and its end."""
    trainer = Trainer(tiny_config(scenes, output, log_every=100))
    count = 0

    def poison(module, arguments, losses):
        nonlocal count
        count += 1
        if count == 3 and distributed.rank() == 1:
            return {**losses, "loss_giou_0": losses["loss_giou_0"] * math.nan}
        return losses

    trainer.model.criterion.register_forward_hook(poison)
    trainer.run()
    total = sum(float(value.double().sum()) for value in trainer.model.state_dict().values())
    return f"{trainer.skips[0]}: {trainer.skips[0].problem} [{len(trainer.skips)} of {trainer.step}] {total}"


def everything(folder: Path, scenes: str) -> None:
    distributed.start("cpu")
    rank = distributed.rank()
    results = {
        (name, dtype, accumulate): gradients(name, dtype, accumulate) for name, dtype in CASES for accumulate in (1, 2)
    }
    torch.save(results, folder / f"gradients{rank}.pt")

    Trainer(tiny_config(scenes, str(folder / "run"), val=scenes, workers=rank)).run()
    (folder / f"poisoned{rank}").write_text(poisoned_run(scenes, str(folder / "poisoned run")))

    model = SparseRCNN.from_pretrained(default_weights())
    three = open_dataset(scenes, "valid")
    one = open_dataset(scenes, "valid").without([1, 2])  # leaves nothing to the second process
    found = [evaluate(model, data, batch_size) for data in (three, one) for batch_size in (1, 2)]
    found += [evaluate_stages(model, data) for data in (three, one)]
    torch.save(found, folder / f"evaluation{rank}.pt")
    distributed.stop()


def train_and_die(arguments: list[str]) -> int:
    """Train; in the n-th start the process RANK of the n-th ``--die`` is killed in its step STEP."""
    cut = arguments.index("--")
    deaths = [tuple(map(int, death.split(":"))) for death in arguments[:cut] if death != "--die"]
    train_step = Trainer.train_step

    def deadly(trainer: Trainer, *batch) -> None:
        if deaths[distributed.restarts() :][:1] == [(distributed.rank(), trainer.step + 1)]:
            os.kill(os.getpid(), signal.SIGKILL)
        train_step(trainer, *batch)

    Trainer.train_step = deadly
    return train.main(arguments[cut + 1 :])


def train_and_end(when: str, arguments: list[str]) -> int:
    """Train; in step STEP process RANK and the launcher get SIGTERM, which the launcher passes on to both."""
    train_step = Trainer.train_step

    def ending(trainer: Trainer, *batch) -> None:
        if when == f"{distributed.rank()}:{trainer.step + 1}":
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(2)  # until the launcher's has come
        train_step(trainer, *batch)

    Trainer.train_step = ending
    return train.main(arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "everything":
        everything(Path(sys.argv[2]), sys.argv[3])
    elif sys.argv[1] == "end":
        sys.exit(train_and_end(sys.argv[2], sys.argv[4:]))
    else:
        sys.exit(train_and_die(sys.argv[2:]))
