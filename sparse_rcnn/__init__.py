"""Sparse R-CNN: end-to-end object detection with learnable proposals (Sun et al., CVPR 2021).

``SparseRCNN`` is the detector, ``SparseRCNNConfig`` its configuration, ``Predictor`` the way from image files to
``Detections``. The operators stand in :mod:`sparse_rcnn.ops` and need nothing but torch and scipy.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_rcnn.detections import Detections
    from sparse_rcnn.models import SparseRCNN, SparseRCNNConfig
    from sparse_rcnn.runtime import Predictor

__version__ = "0.1.0"
__all__ = ["Detections", "Predictor", "SparseRCNN", "SparseRCNNConfig", "__version__"]

# In a checkout the Triton kernels lie beside the package, in kernels/; installed, they lie in it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

# Resolved on first use, so that `import sparse_rcnn.ops` loads neither torchvision nor Pillow.
_HOMES = {
    "Detections": "sparse_rcnn.detections",
    "Predictor": "sparse_rcnn.runtime",
    "SparseRCNN": "sparse_rcnn.models",
    "SparseRCNNConfig": "sparse_rcnn.models",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
