"""The detector: training in every configuration, and what evaluation makes of the head's outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn


class FixedHead(nn.Module):
    """A head that says what it was told to, so that detections can be worked out by hand."""

    def __init__(self, logits, boxes):
        super().__init__()
        self.logits, self.boxes = torch.tensor(logits), torch.tensor(boxes)

    def forward(self, features, boxes, proposal_features, forbidden=None):
        return self.logits[None, None], self.boxes[None, None]


def train_step(model, images, targets):
    losses = model(images, targets)
    sum(losses.values()).backward()
    return losses


def names_of_losses(stages):
    suffixes = ["", *(f"_{i}" for i in range(stages - 1))]
    return {f"loss_{kind}{suffix}" for kind in ("ce", "bbox", "giou") for suffix in suffixes}


def test_eighteen_losses(tiny, build, images, targets):
    losses = train_step(build(tiny.replace(num_stages=6)), images, targets)
    assert len(losses) == 18
    assert set(losses) == names_of_losses(6)
    assert all(value.dim() == 0 and value > 0 for value in losses.values())


def test_losses_are_the_criterions_of_the_stages(tiny, build, images, targets):
    model = build(tiny)
    out = model(images, targets, return_stages=True)
    losses = model(images, targets)
    assert out.losses == losses
    assert out.detections == []
    for stage, suffix in enumerate(("_0", "_1", "")):
        alone = build(tiny.replace(num_stages=stage + 1))
        alone.load_state_dict(model.state_dict(), strict=False)
        last = alone(images, targets)
        for kind in ("ce", "bbox", "giou"):
            torch.testing.assert_close(losses[f"loss_{kind}{suffix}"], last[f"loss_{kind}"])


VARIANTS = [
    {},
    {"num_stages": 1},
    {"num_stages": 2},
    {"interaction": "concat"},
    {"interaction": "plain"},
    {"interaction": "plain", "self_attention": False},
    {"interaction": "concat", "self_attention": False},
    {"self_attention": False},
    {"classification": "softmax"},
    {"proposal_init": "image"},
    {"proposal_init": "center"},
    {"proposal_init": "random"},
    {"level_rule": "mmdet", "delta_clamp": (-4.135, 4.135)},
    {"num_classes": 1, "num_cls_layers": 0, "num_reg_layers": 0},
    {"backbone": "resnet18", "frozen_stages": 2},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_variant_trains(tiny, build, images, targets, changes):
    config = tiny.replace(**changes)
    model = build(config)
    if config.num_classes == 1:
        targets = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
    losses = train_step(model, images, targets)
    assert set(losses) == names_of_losses(config.num_stages)
    assert all(value.isfinite() for value in losses.values())
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert ("init_proposal_features.weight" in trainable) == (config.interaction != "plain")
    assert [name for name, p in trainable.items() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in trainable.values())
    moved = [name for name, p in trainable.items() if p.grad.any()]
    assert {"init_proposal_boxes.weight", "head.stages.0.class_logits.bias"} <= set(moved)
    assert len(moved) > 0.9 * len(trainable)


@pytest.mark.parametrize("changes", [{}, {"interaction": "concat"}, {"classification": "softmax"}], ids=str)
def test_the_gradient_is_the_slope_of_the_loss(tiny, build, images, targets, changes):
    """Of one stage and fixed initial boxes, where nothing is detached."""
    model = build(tiny.replace(num_stages=1, **changes)).double()
    parameters = [p for name, p in model.named_parameters() if name != "init_proposal_boxes.weight"]
    train_step(model, images, targets)
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    totals = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p in parameters:
                p.add_(p.grad * (step / norm))
            totals.append(sum(model(images, targets).values()))
    slope = (totals[0] - totals[1]) / 2e-5
    torch.testing.assert_close(slope.double(), norm, rtol=0.01, atol=0.0)


def test_without_deep_supervision_the_last_stage_alone_counts(tiny, build, images, targets):
    every = build(tiny)(images, targets)
    model = build(tiny.replace(deep_supervision=False))
    losses = train_step(model, images, targets)
    assert set(losses) == {"loss_ce", "loss_bbox", "loss_giou"}
    for name, value in losses.items():
        torch.testing.assert_close(value, every[name])
    first, last = model.head.stages[0], model.head.stages[-1]
    for layer in (first.class_logits, first.bboxes_delta):
        assert layer.weight.grad is None or not layer.weight.grad.any()
    assert last.class_logits.weight.grad.any()
    assert first.linear1.weight.grad.any()


def test_initial_boxes_learn_from_the_first_stage_only(tiny, build, images, targets):
    model = build(tiny)
    losses = model(images, targets)

    def reach(name, parameter):
        return torch.autograd.grad(losses[name], parameter, retain_graph=True, allow_unused=True)[0]

    for name in ("loss_bbox", "loss_giou", "loss_bbox_1", "loss_giou_1", "loss_ce", "loss_ce_0"):
        gradient = reach(name, model.init_proposal_boxes.weight)
        assert gradient is None or not gradient.any(), name
    for name in ("loss_bbox_0", "loss_giou_0"):
        assert reach(name, model.init_proposal_boxes.weight).any(), name
        assert reach(name, model.init_proposal_features.weight).any(), name
    assert reach("loss_bbox", model.init_proposal_features.weight).any()


def test_more_targets_than_proposals(tiny, build, images, targets):
    model = build(tiny.replace(num_proposals=2))
    corners = torch.arange(8.0)[:, None].expand(8, 2)
    crowd = {"boxes": torch.cat([corners, corners + 30], dim=1), "labels": torch.arange(8) % 5}
    losses = train_step(model, images, [crowd, targets[1]])
    assert all(value.isfinite() and value > 0 for value in losses.values())
    assert model.init_proposal_boxes.weight.grad.isfinite().all()


@pytest.mark.parametrize("classification", ["focal", "softmax"])
@pytest.mark.parametrize("empty", [(0,), (0, 1)])
def test_images_without_boxes(tiny, build, images, targets, empty, classification):
    model = build(tiny.replace(classification=classification))
    nothing = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)}
    targets = [nothing if index in empty else target for index, target in enumerate(targets)]
    losses = train_step(model, images, targets)
    for name, value in losses.items():
        assert value.isfinite()
        assert (value > 0) == (len(empty) == 1 or "ce" in name), name
    assert all(p.grad.isfinite().all() for p in model.parameters())
    if len(empty) == 2 and classification == "focal":  # background only: pushes the class scores down
        assert losses["loss_ce"] < 10
        assert (model.head.stages[-1].class_logits.bias.grad > 0).all()


def test_permuting_the_proposals_permutes_the_outputs(tiny, build, images):
    model = build(tiny).double().eval()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    with torch.no_grad():
        expected = model(images, return_stages=True)
        for embedding in (model.init_proposal_boxes, model.init_proposal_features):
            embedding.weight.copy_(embedding.weight[order])
        actual = model(images, return_stages=True)
    torch.testing.assert_close(actual.logits, expected.logits[:, :, order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actual.boxes, expected.boxes[:, :, order], rtol=1e-9, atol=1e-7)
    assert (expected.logits - expected.logits[:, :, order]).abs().max() > 1e-3


def test_an_image_alone_equals_the_image_in_a_batch_of_equal_sizes(tiny, build):
    model = build(tiny).double().eval()
    images = list(torch.rand(3, 3, 40, 70, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        batch = model(images, return_stages=True)
        for index, image in enumerate(images):
            alone = model([image], return_stages=True)
            torch.testing.assert_close(batch.logits[:, index], alone.logits[:, 0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(batch.boxes[:, index], alone.boxes[:, 0], rtol=1e-9, atol=1e-7)


def test_images_are_normalised_and_padded_to_a_multiple_of_32(tiny, build, images):
    model = build(tiny).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        out = model(images, return_stages=True)
    (batch,) = seen
    assert batch.shape == (2, 3, 64, 96)
    for slot, image in zip(batch, images, strict=True):
        height, width = image.shape[1:]
        expected = torch.zeros(3, 64, 96)
        for channel, (mean, std) in enumerate(zip((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), strict=True)):
            expected[channel, :height, :width] = (image[channel] * 255 - mean) / std
        torch.testing.assert_close(slot, expected)
    # The proposals are placed on the image without its padding: a grid of three columns and rows.
    torch.testing.assert_close(out.proposal_boxes[0, 4], torch.tensor([64 / 3, 50 / 3, 128 / 3, 100 / 3]))
    torch.testing.assert_close(out.proposal_boxes[1, 5], torch.tensor([60, 40 / 3, 90, 80 / 3]))


def test_uint8_and_float_images_are_the_same(tiny, build):
    model = build(tiny).eval()
    image = torch.randint(0, 256, (3, 45, 61), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model([image], return_stages=True)
        actual = model([image / 255], return_stages=True)
        mixed = model([image, image.double() / 255], return_stages=True)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.boxes, expected.boxes, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(mixed.logits[:, 0], mixed.logits[:, 1], rtol=1e-4, atol=1e-4)


def test_stages_and_detections_agree(tiny, build, images):
    model = build(tiny).eval()
    with torch.no_grad():
        out = model(images, return_stages=True)
        found = model(images)
    assert out.logits.shape == (3, 2, 6, 5)
    assert out.boxes.shape == (3, 2, 6, 4)
    assert out.losses == {}
    for index, (image, result) in enumerate(zip(images, found, strict=True)):
        scored = sorted(
            ((1 / (1 + torch.exp(-logit)).item(), n, k) for n, row in enumerate(out.logits[-1, index])
             for k, logit in enumerate(row)), reverse=True,
        )[:6]  # fmt: skip
        height, width = image.shape[1:]
        rows = []
        for score, n, k in scored:
            x1, y1, x2, y2 = out.boxes[-1, index, n].tolist()
            box = [min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)]
            if box[0] < box[2] and box[1] < box[3]:
                rows.append((box, score, k, n))
        assert rows
        assert result["labels"].dtype == torch.int64
        assert result["labels"].tolist() == [label for _, _, label, _ in rows]
        assert result["proposals"].tolist() == [proposal for *_, proposal in rows]
        torch.testing.assert_close(result["boxes"], torch.tensor([box for box, *_ in rows]))
        torch.testing.assert_close(result["scores"], torch.tensor([score for _, score, _, _ in rows]))
        for key, value in out.detections[index].items():
            torch.testing.assert_close(value, result[key])


BOXES = [[1.0, 2, 30, 40], [-20, -10, 500, 25], [70, 5, 90, 20], [5, 30, 5, 40], [10, 10, 20, 20], [0, 0, 9, 9]]
IMAGE = torch.zeros(3, 48, 60)


def test_detections_by_hand(tiny, build):
    model = build(tiny).eval()
    logits = [[-9.0] * 5 for _ in range(6)]
    logits[0][3], logits[0][1] = 2.0, 1.0  # one box under two classes
    logits[1][0] = 3.0  # reaches out of the image
    logits[2][4] = 2.5  # lies outside: dropped
    logits[3][2] = 1.5  # has no width: dropped
    logits[5][4] = -1.0  # the sixth and last of the scores; proposal 4 has no room
    model.head = FixedHead(logits, BOXES)
    with torch.no_grad():
        (found,) = model([IMAGE])
    assert found["labels"].tolist() == [0, 3, 1, 4]
    assert found["proposals"].tolist() == [1, 0, 0, 5]
    assert found["boxes"].tolist() == [[0, 0, 60, 25], [1, 2, 30, 40], [1, 2, 30, 40], [0, 0, 9, 9]]
    torch.testing.assert_close(found["scores"], torch.tensor([3.0, 2, 1, -1]).sigmoid())


def test_softmax_detections_by_hand(tiny, build):
    model = build(tiny.replace(classification="softmax", num_classes=2)).eval()
    # Two classes and "no object", which is never a label, as probabilities.
    chances = [[0.2, 0.7, 0.1], [0.05, 0.05, 0.9], [0.9, 0.05, 0.05], [0.4, 0.1, 0.5], [0.1, 0.6, 0.3], [0.3, 0.2, 0.5]]
    model.head = FixedHead(torch.tensor(chances).log().tolist(), BOXES)
    with torch.no_grad():
        (found,) = model([IMAGE])
    # Proposals 2 and 3 are dropped as empty.
    torch.testing.assert_close(found["scores"], torch.tensor([0.7, 0.6, 0.3, 0.05]))
    assert found["labels"][:3].tolist() == [1, 1, 0]
    assert found["proposals"].tolist() == [0, 4, 5, 1]
    assert found["boxes"].tolist() == [[1, 2, 30, 40], [10, 10, 20, 20], [0, 0, 9, 9], [0, 0, 60, 25]]


def test_at_most_as_many_detections_as_proposals(tiny, build):
    model = build(tiny).eval()
    logits = [[float(n + k) for k in range(5)] for n in range(6)]
    model.head = FixedHead(logits, [[0.0, 0, 10 + n, 10] for n in range(6)])
    with torch.no_grad():
        (found,) = model([IMAGE])
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
    torch.testing.assert_close(found["scores"], torch.tensor([9.0, 8, 8, 7, 7, 7]).sigmoid())
    assert sorted(zip((found["boxes"][:, 2] - 10).tolist(), found["labels"].tolist(), strict=True)) == [
        *((3, 4), (4, 3), (4, 4)),
        *((5, 2), (5, 3), (5, 4)),
    ]


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (33, 2)])
def test_tiny_images(tiny, build, size):
    model = build(tiny).eval()
    with torch.no_grad():
        out = model([torch.rand(3, *size)], return_stages=True)
    assert out.logits.isfinite().all()
    assert out.boxes.isfinite().all()
    (found,) = out.detections
    assert len(found["boxes"]) > 0
    assert found["boxes"].min() >= 0
    assert (found["boxes"] <= torch.tensor([size[1], size[0]] * 2)).all()


def test_double_is_close_to_float(tiny, build, images):
    model = build(tiny).eval()
    with torch.no_grad():
        single, double = model(images, return_stages=True), model.double()(images, return_stages=True)
    assert double.logits.dtype == torch.float64
    torch.testing.assert_close(single.logits.double(), double.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(single.boxes.double(), double.boxes, rtol=1e-3, atol=0.05)


def test_double_trains(tiny, build, images, targets):
    single, double = (train_step(model, images, targets) for model in (build(tiny), build(tiny).double()))
    assert {name: value.item() for name, value in double.items()} == pytest.approx(
        {name: value.item() for name, value in single.items()}, rel=1e-3
    )
    assert double["loss_bbox"].dtype == torch.float64


def test_bfloat16_autocast_is_close_to_float(tiny, build, images, targets):
    model = build(tiny).eval()
    with torch.no_grad():
        exact = model(images, return_stages=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(images, return_stages=True)
    assert rounded.logits.dtype == rounded.boxes.dtype == torch.float32
    assert (rounded.logits - exact.logits)[0].abs().max() < 0.1
    assert (rounded.boxes - exact.boxes)[0].abs().max() < 2
    assert (rounded.logits != exact.logits).any()
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = train_step(model, images, targets)
    expected = model(images, targets)
    assert losses["loss_ce_0"].item() == pytest.approx(expected["loss_ce_0"].item(), rel=0.05)
    assert losses["loss_giou_0"].item() == pytest.approx(expected["loss_giou_0"].item(), rel=0.05)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "images: expected a list of at least one CHW tensor"),
        (torch.zeros(3, 32, 32), ValueError, "images: expected a list of at least one CHW tensor"),
        ([torch.zeros(3, 8, 8), "a.jpg"], TypeError, r"images\[1\]: expected a tensor, got str"),
        ([torch.zeros(1, 8, 8)], ValueError, r"images\[0\]: expected shape \[3, H, W\], got \[1, 8, 8\]"),
        ([torch.zeros(8, 8, 3)], ValueError, r"images\[0\]: expected shape \[3, H, W\], got \[8, 8, 3\]"),
        ([torch.zeros(8, 8)], ValueError, r"images\[0\]: expected shape \[3, H, W\], got \[8, 8\]"),
        ([torch.zeros(3, 0, 8)], ValueError, r"images\[0\]: expected shape \[3, H, W\], got \[3, 0, 8\]"),
        ([torch.zeros(3, 8, 8).int()], TypeError, r"images\[0\]: expected uint8 0..255 or floating point 0..1"),
    ],
)
def test_image_errors(tiny, build, images, error, message):
    with pytest.raises(error, match=message):
        build(tiny).eval()(images)


BOX, LABEL = torch.tensor([[1.0, 1, 9, 9]]), torch.tensor([0])


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (None, ValueError, "targets: expected a dict an image in training mode, got None"),
        ([], ValueError, "targets: expected 1, one an image, got 0"),
        ([{"boxes": BOX, "labels": LABEL}] * 2, ValueError, "targets: expected 1, one an image, got 2"),
        ([{"boxes": BOX}], TypeError, r"targets\[0\]: expected a dict with boxes and labels"),
        ([{"boxes": BOX, "labels": LABEL + 5}], ValueError, r"targets\[0\].labels: expected 0..4, got 5..5"),
        ([{"boxes": BOX.flip(1), "labels": LABEL}], ValueError, r"targets\[0\].boxes: expected x1 < x2"),
    ],
)
def test_target_errors(tiny, build, targets, error, message):
    with pytest.raises(error, match=message):
        build(tiny)([torch.zeros(3, 16, 16)], targets)


def test_evaluation_ignores_targets(tiny, build, images, targets):
    model = build(tiny).eval()
    with torch.no_grad():
        for ours, theirs in zip(model(images, targets), model(images), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_learned_boxes_start_where_the_configuration_says(tiny, build):
    corner = [1 / 6, 1 / 6, 1 / 3, 1 / 3]
    for kind, first in (("image", [0.5, 0.5, 1, 1]), ("center", [0.5, 0.5, 0.1, 0.1]), ("grid", corner)):
        weight = build(tiny.replace(proposal_init=kind)).init_proposal_boxes.weight
        torch.testing.assert_close(weight[0], torch.tensor(first, dtype=torch.float32))
    assert build(tiny).init_proposal_features.weight.std().item() == pytest.approx(1.0, abs=0.2)


def test_the_default_configuration_is_the_papers():
    from sparse_rcnn import SparseRCNN, SparseRCNNConfig

    with torch.device("meta"):
        model = SparseRCNN(None)
    assert model.config == SparseRCNNConfig()
