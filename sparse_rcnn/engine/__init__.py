"""Training and evaluation: the loop, the optimizer's recipe, checkpoints, logs and COCO metrics."""

from sparse_rcnn.engine.config import TrainConfig
from sparse_rcnn.engine.evaluator import EvalResult, evaluate
from sparse_rcnn.engine.trainer import Trainer, TrainingError

__all__ = ["EvalResult", "TrainConfig", "Trainer", "TrainingError", "evaluate"]
