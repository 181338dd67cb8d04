"""The detector and its parts."""

from sparse_rcnn.models.config import PRESETS, SparseRCNNConfig
from sparse_rcnn.models.dynamic_head import DynamicHead
from sparse_rcnn.models.sparse_rcnn import SparseRCNN, StageOutputs

__all__ = ["PRESETS", "DynamicHead", "SparseRCNN", "SparseRCNNConfig", "StageOutputs"]
