"""What a recipe comes to on a data set and a batch: learning rate, steps, and the steps at which the rate falls."""

from __future__ import annotations

import dataclasses
import math

from sparse_rcnn.engine.config import TrainConfig
from sparse_rcnn.models.config import SparseRCNNConfig

# For 16 images: the paper's, and that of the bundled model's run for narrower heads on ImageNet backbones.
_PAPER_LR = 2.5e-5
_SMALL_LR = 8e-4
_OUT_OF_PROPORTION = 4.0


def usual_lr(model: SparseRCNNConfig) -> float:
    """The learning rate for batches of 16 where no recipe states one: the paper's for models as wide as the paper's."""
    return _PAPER_LR if model.hidden_dim >= 256 else _SMALL_LR


def resolve(config: TrainConfig, model: SparseRCNNConfig, num_images: int) -> tuple[TrainConfig, list[str]]:
    """``config`` with numbers for ``lr``, ``steps`` and ``decay_steps``, and lines that tell the user.

    Those that are given are taken as they are. Otherwise ``lr`` is ``base_lr`` in proportion to the batch (the linear
    rule: the paper's 2.5e-5 is for 16 images), ``steps`` are ``epochs`` passes over the data, rounded up, and
    ``decay_steps`` the parts ``decay_at`` of the steps.

    Args:
        config: of the run.
        model: what is trained.
        num_images: of the training data.
    """
    batch = config.batch_size
    base_lr = usual_lr(model) if config.base_lr is None else config.base_lr
    scaled = base_lr * batch / config.base_batch
    lr = scaled if config.lr is None else config.lr
    steps = config.steps
    if steps is None:
        steps = max(1, math.ceil(config.epochs * num_images / batch - 1e-6))  # 1e-6: rounding, as in 0.1 * 30
    decay_steps = config.decay_steps
    if decay_steps is None:
        decay_steps = tuple(round(part * steps) for part in config.decay_at)
    resolved = dataclasses.replace(config, lr=lr, steps=steps, decay_steps=decay_steps)

    rule = f"{base_lr:.3g} for {config.base_batch} images"
    origin = f", from {rule}" if config.lr is None else ""
    falls = f", divided by 10 at steps {', '.join(map(str, decay_steps))}" if decay_steps else ""
    epochs = steps * batch / num_images
    notes = [
        f"schedule: {steps} steps of {batch} images ({epochs:.3g} epochs of {num_images}), learning rate {lr:.3g}"
        f"{origin}{falls}"
    ]
    ratio = lr / scaled
    if not 1 / _OUT_OF_PROPORTION < ratio < _OUT_OF_PROPORTION:
        times = f"{ratio:.3g} times" if ratio > 1 else f"1/{1 / ratio:.3g} of"
        notes.append(
            f"warning: the learning rate {lr:.3g} is {times} what {rule} comes to for {batch}; --lr {scaled:.3g} is in "
            "proportion"
        )
    if config.warmup_steps >= steps:
        notes.append(f"warning: the warm-up of {config.warmup_steps} steps is as long as the run of {steps}")
    return resolved, notes
