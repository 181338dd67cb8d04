"""What a detector found in one image: filtering, suppression, exchange formats and drawing."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparse_rcnn.coco_classes import category_ids_of

if TYPE_CHECKING:
    import PIL.Image

CSV_HEADER = ("file_name", "width", "height", "label", "name", "score", "x1", "y1", "x2", "y2")


class Detection(NamedTuple):
    """One row of :class:`Detections`: ``box`` is (x1, y1, x2, y2) in pixels of the original image."""

    box: tuple[float, float, float, float]
    score: float
    label: int
    name: str


@dataclass(eq=False, repr=False)
class Detections:
    """Detections of one image, in NumPy arrays; n of them, best score first as a ``Predictor`` makes them.

    Anything that ``numpy.asarray`` takes is accepted, CPU tensors too, and brought to the types below.

    Attributes:
        boxes: float32 [n, 4], xyxy in pixels of the original image.
        scores: float32 [n], 0..1.
        labels: int64 [n], indices into ``class_names``.
        class_names: the K names in label order.
        image_size: (height, width) of the original image.
        source: path or URL of the image, None for one that came as pixels.
        image: uint8 [H, W, 3] RGB, only where the predictor was asked to keep it.
        proposal_index: int64 [n], the proposal that each detection came from; this and the next three are None
            unless the stages were asked for, with N proposals and S stages.
        proposal_boxes: float32 [N, 4], the learned boxes that stage 0 starts from; xyxy like ``boxes``, not clipped.
        stage_boxes: float32 [S, N, 4], the boxes that each stage returned; xyxy like ``boxes``, not clipped.
        stage_scores: float32 [S, N], the best class score of each proposal after each stage.

    Raises:
        ValueError: an array has another shape than these, or a label has no name.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    source: str | None = None
    image: np.ndarray | None = None
    proposal_index: np.ndarray | None = None
    proposal_boxes: np.ndarray | None = None
    stage_boxes: np.ndarray | None = None
    stage_scores: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.class_names = tuple(self.class_names)
        self.image_size = (int(self.image_size[0]), int(self.image_size[1]))
        self.boxes = np.asarray(self.boxes, dtype=np.float32)
        if self.boxes.size == 0:
            self.boxes = self.boxes.reshape(0, 4)
        count = len(self.boxes)
        self._bring("boxes", np.float32, (count, 4))
        self._bring("scores", np.float32, (count,))
        self._bring("labels", np.int64, (count,))
        unnamed = (self.labels < 0) | (self.labels >= len(self.class_names))
        if unnamed.any():
            raise ValueError(f"labels: expected 0..{len(self.class_names) - 1}, got {self.labels[unnamed][0]}")
        if self.stage_boxes is not None:
            stages, proposals = np.shape(self.stage_boxes)[:2]
            self._bring("proposal_index", np.int64, (count,))
            self._bring("proposal_boxes", np.float32, (proposals, 4))
            self._bring("stage_boxes", np.float32, (stages, proposals, 4))
            self._bring("stage_scores", np.float32, (stages, proposals))

    def _bring(self, field: str, dtype: type, shape: tuple[int, ...]) -> None:
        value = getattr(self, field)
        array = np.asarray([] if value is None else value, dtype=dtype)
        if array.shape != shape:
            raise ValueError(f"{field}: expected shape {list(shape)}, got {list(array.shape)}")
        setattr(self, field, array)

    @property
    def names(self) -> list[str]:
        """Class name of each detection."""
        return [self.class_names[label] for label in self.labels]

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[Detection]:
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), self.names, strict=True)
        return (Detection(tuple(box), score, label, name) for box, score, label, name in rows)

    def __getitem__(self, index: slice | Sequence[int] | np.ndarray) -> Detections:
        """The detections that a slice, a list of positions or a boolean mask selects."""
        index = index if isinstance(index, slice) else np.atleast_1d(np.asarray(index))
        if isinstance(index, np.ndarray) and index.size == 0:
            index = index.astype(np.int64)
        rows = {"boxes": self.boxes[index], "scores": self.scores[index], "labels": self.labels[index]}
        if self.proposal_index is not None:
            rows["proposal_index"] = self.proposal_index[index]
        return dataclasses.replace(self, **rows)

    def __repr__(self) -> str:
        found = ", ".join(f"{count} {name}" for name, count in Counter(self.names).most_common())
        source = f", source={self.source!r}" if self.source is not None else ""
        return f"Detections({found or 'nothing'}, image_size={self.image_size}{source})"

    def filter(
        self,
        score_threshold: float = 0.0,
        top_k: int | None = None,
        classes: Sequence[str | int] | None = None,
    ) -> Detections:
        """Those of ``classes`` (names or labels) that score at least ``score_threshold``, the ``top_k`` best of them.

        Raises:
            ValueError: a class that the model does not know; the message lists those that it does.
        """
        keep = self.scores >= score_threshold
        if classes is not None:
            keep &= np.isin(self.labels, resolve_classes(classes, self.class_names))
        kept = np.flatnonzero(keep)
        if top_k is not None:
            best = kept[np.argsort(-self.scores[kept], kind="stable")[:top_k]]
            kept = np.sort(best)  # the order stays what it was
        return self[kept]

    def nms(self, iou: float, votes: bool = False) -> Detections:
        """Class-wise non-maximum suppression, best score first.

        Sparse R-CNN needs none: it is for models trained briefly, or for one box an object under strict conditions.

        With ``votes`` what is suppressed is heard: of a detection that stays with score s, the score becomes
        1 - exp(-s sqrt(v)), where v is the sum of the scores of all of its class that overlap it by more than ``iou``,
        itself among them. Many proposals agree on an object where training matched several with it
        (``config.match_iou``), few on what only looks like one, so that the order gets better. The formula is our own;
        that a score depends on how many agree is known from Weighted Boxes Fusion (Solovyev et al., Image and Vision
        Computing 2021).

        Args:
            iou: of two boxes of one class that overlap more than this, the one of lower score goes. From 1 on all stay
                as they are.
            votes: let the others change the scores of those that stay.
        """
        import torch
        from torchvision.ops import batched_nms, box_iou

        boxes, scores, labels = (torch.from_numpy(array) for array in (self.boxes, self.scores, self.labels))
        kept = batched_nms(boxes, scores, labels, iou)
        if not votes or iou >= 1:
            return self[kept.numpy()]
        agree = (box_iou(boxes[kept], boxes) > iou) & (labels[kept, None] == labels)
        agree[torch.arange(len(kept)), kept] = True  # a box without area does not overlap itself
        raised = -torch.expm1(-scores[kept] * (agree * scores).sum(dim=1).sqrt())
        order = raised.argsort(descending=True, stable=True)
        return dataclasses.replace(self[kept[order].numpy()], scores=raised[order].numpy())

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """COCO results, as ``pycocotools`` loads them: ``bbox`` is x, y, width, height in pixels.

        Args:
            image_id: id of the image in the annotation file.
            category_ids: category id of each label; by default COCO's own for the 80 COCO classes, else label + 1.
        """
        category_ids = category_ids_of(self.class_names) if category_ids is None else category_ids
        if len(category_ids) != len(self.class_names):
            raise ValueError(f"category_ids: expected {len(self.class_names)} ids, got {len(category_ids)}")
        return [
            {
                "image_id": image_id,
                "category_id": int(category_ids[label]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for (x1, y1, x2, y2), score, label, _ in self
        ]

    def to_csv(self, file_name: str | None = None) -> list[tuple[Any, ...]]:
        """One row for each detection under ``CSV_HEADER``: pixels with two decimals, scores with four."""
        name = file_name if file_name is not None else self.source or ""
        height, width = self.image_size
        return [
            (name, width, height, row.label, row.name, f"{row.score:.4f}", *(f"{value:.2f}" for value in row.box))
            for row in self
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; the stages too if they are known."""
        height, width = self.image_size
        values: dict[str, Any] = {
            "source": self.source,
            "height": height,
            "width": width,
            "detections": [
                {"box": list(box), "score": score, "label": label, "name": name} for box, score, label, name in self
            ],
        }
        if self.stage_boxes is not None:
            for field in ("proposal_index", "proposal_boxes", "stage_boxes", "stage_scores"):
                values[field] = getattr(self, field).tolist()
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], class_names: Sequence[str]) -> Detections:
        """What :meth:`to_dict` gave, back from JSON too: the same numbers."""
        rows = values["detections"]
        stages = ("proposal_index", "proposal_boxes", "stage_boxes", "stage_scores")
        return cls(
            boxes=[row["box"] for row in rows],
            scores=[row["score"] for row in rows],
            labels=[row["label"] for row in rows],
            class_names=tuple(class_names),
            image_size=(values["height"], values["width"]),
            source=values.get("source"),
            **{field: values[field] for field in stages if field in values},
        )

    def to_json(self) -> str:
        """:meth:`to_dict` on one line."""
        return json.dumps(self.to_dict())

    def to_supervision(self) -> Any:
        """A ``supervision.Detections``, class names under ``data["class_name"]``.

        Raises:
            ImportError: the package ``supervision`` is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision: needs the package supervision (pip install supervision)") from error
        return supervision.Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self, image: Any = None) -> PIL.Image.Image:
        """The image with the boxes, class names and scores drawn on it.

        Args:
            image: PIL image, uint8 [H, W, 3] RGB array or path; by default the kept image, else that of ``source``.
        """
        from sparse_rcnn.drawing import draw_detections

        return draw_detections(self._picture(image), self)

    def draw_stages(self, image: Any = None) -> PIL.Image.Image:
        """A strip of panels: the proposals, then the boxes of each stage, of what became a detection here."""
        from sparse_rcnn.drawing import draw_stages

        return draw_stages(self._picture(image), self)

    def _picture(self, image: Any) -> Any:
        image = next((choice for choice in (image, self.image, self.source) if choice is not None), None)
        if image is None:
            raise ValueError("image: expected the image to draw on, got None, and none was kept")
        return image


def resolve_classes(classes: Sequence[str | int], class_names: Sequence[str]) -> list[int]:
    """Labels of classes given by name or by label; a string of digits counts as a label unless it is a name.

    Raises:
        ValueError: a class that is not there; the message lists those that are.
    """
    labels = []
    for wanted in [classes] if isinstance(classes, str) else classes:
        text = str(wanted)
        if text in class_names:
            labels.append(class_names.index(text))
        elif text.isdecimal() and int(text) < len(class_names):
            labels.append(int(text))
        else:
            known = ", ".join(class_names)
            raise ValueError(f"classes: {text!r} is unknown, the model knows {known} (or 0..{len(class_names) - 1})")
    return labels
