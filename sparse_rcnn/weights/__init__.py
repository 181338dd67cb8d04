"""Checkpoints: own format, official and mmdetection, read without executing anything."""

from sparse_rcnn.weights.check import check_state_dict
from sparse_rcnn.weights.export import export_checkpoint
from sparse_rcnn.weights.pretrained import Checkpoint, load_pretrained, read_checkpoint, read_config, save_pretrained
from sparse_rcnn.weights.safe_load import safe_load

__all__ = [
    "Checkpoint",
    "check_state_dict",
    "export_checkpoint",
    "load_pretrained",
    "read_checkpoint",
    "read_config",
    "safe_load",
    "save_pretrained",
]
