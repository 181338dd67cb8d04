"""Set prediction losses: matching, then a loss of every stage. Needs torch and scipy only."""

from sparse_rcnn.losses.matcher import HungarianMatcher
from sparse_rcnn.losses.set_criterion import SetCriterion
from sparse_rcnn.losses.targets import PackedTargets, pack_targets

__all__ = ["HungarianMatcher", "PackedTargets", "SetCriterion", "pack_targets"]
