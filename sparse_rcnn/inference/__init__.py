"""Fast inference: fused convolutions, one type, constants computed once, and on a GPU one CUDA graph a shape."""

from sparse_rcnn.inference.memory import keep_freed_memory
from sparse_rcnn.inference.optimized import OptimizedSparseRCNN, StaleWeightsError, padded_shape, resolve_dtype

__all__ = ["OptimizedSparseRCNN", "StaleWeightsError", "keep_freed_memory", "padded_shape", "resolve_dtype"]
