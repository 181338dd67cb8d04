"""The bundled model on scenes that it has not seen."""

from __future__ import annotations

from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.data.synthetic import CLASS_NAMES, write_dataset
from sparse_rcnn.engine.evaluator import evaluate
from sparse_rcnn.models import SparseRCNN
from sparse_rcnn.runtime import default_weights


def test_the_bundled_model_detects(tmp_path):
    write_dataset(tmp_path, 24, seed=77, split="valid", progress=False)
    model = SparseRCNN.from_pretrained(default_weights())
    assert model.config.class_names == tuple(CLASS_NAMES)
    metrics = evaluate(model, open_dataset(tmp_path, "valid")).metrics
    assert metrics["AP"] > 0.5
    assert metrics["AP50"] > 0.75


def test_the_bundled_model_is_small():
    assert sum(file.stat().st_size for file in default_weights().iterdir()) < 20e6
