from __future__ import annotations

import pytest
import torch

from sparse_rcnn import SparseRCNN, SparseRCNNConfig
from sparse_rcnn.engine.build import build_model
from sparse_rcnn.engine.trainer import Trainer
from sparse_rcnn.models.proposals import initial_boxes
from sparse_rcnn.weights import export_checkpoint


@pytest.fixture
def checkpoint(tmp_path, tiny_config):
    """A saved tiny model of three classes; gives (folder, model)."""
    torch.manual_seed(3)
    config = SparseRCNNConfig.preset("small", backbone="resnet18", num_classes=3, **tiny_config().set)
    model = SparseRCNN(config.replace(class_names=("cat", "dog", "cow")))
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source", model


def fine_tune(tiny_config, folder, class_names, **overrides):
    return build_model(tiny_config(weights=str(folder), backbone=None, set=overrides), class_names)


def class_layers(model) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if ".class_logits." in name}


def other_layers(model) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if ".class_logits." not in name}


def equal(a: dict, b: dict) -> list[bool]:
    assert a.keys() == b.keys()
    return [a[name].shape == b[name].shape and torch.equal(a[name], b[name]) for name in a]


@pytest.mark.parametrize(
    ("class_names", "note"),
    [
        (("ship", "train"), "class_logits re-initialised in 2 stages: 3 classes in the weights, 2 in the data"),
        (
            ("cat", "cow", "dog"),
            "class_logits re-initialised in 2 stages: 3 classes in the weights, 3 others in the data",
        ),
    ],
)
def test_other_classes_get_a_new_class_layer_and_everything_else_is_kept(checkpoint, tiny_config, class_names, note):
    folder, source = checkpoint
    model, notes = fine_tune(tiny_config, folder, class_names)
    assert notes[1:] == [note]
    assert model.config.class_names == class_names and model.config.num_classes == len(class_names)
    assert all(equal(other_layers(model), other_layers(source)))
    weights = [name for name in class_layers(model) if name.endswith("weight")]
    assert weights and not any(
        equal({k: class_layers(model)[k] for k in weights}, {k: class_layers(source)[k] for k in weights})
    )


def test_the_same_classes_keep_their_layer(checkpoint, tiny_config):
    folder, source = checkpoint
    model, notes = fine_tune(tiny_config, folder, ("cat", "dog", "cow"))
    assert len(notes) == 1
    assert all(equal(dict(model.state_dict()), dict(source.state_dict())))


def test_overrides_that_keep_the_shapes_apply_and_others_are_refused(checkpoint, tiny_config):
    folder, _ = checkpoint
    model, _ = fine_tune(tiny_config, folder, ("cat", "dog", "cow"), min_size=48, giou_weight=1.5)
    assert model.config.min_size == 48 and model.config.giou_weight == 1.5
    with pytest.raises(ValueError, match=r"init_proposal_features\.weight: expected shape \(10, 64\), got \(10, 32\)"):
        fine_tune(tiny_config, folder, ("cat", "dog", "cow"), hidden_dim=64)


PROPOSALS = ("init_proposal_boxes.weight", "init_proposal_features.weight")


def trained_proposals(source) -> None:
    """Give every proposal a box and a feature of its own, as training does."""
    with torch.no_grad():
        source.init_proposal_boxes.weight.copy_(torch.rand(source.init_proposal_boxes.weight.shape))


@pytest.mark.parametrize("family", ["own", "official", "mmdet"])
@pytest.mark.parametrize(
    ("count", "note"),
    [
        (7, "proposals: 10 in the weights, 7 here; the first 7 are kept, 3 dropped"),
        (16, "proposals: 10 in the weights, 16 here; 6 start anew (image boxes, random features)"),
    ],
)
def test_proposals_are_dropped_or_added_and_classes_replaced_in_any_format(
    checkpoint, tiny_config, tmp_path, family, count, note
):
    folder, source = checkpoint
    trained_proposals(source)
    source.save_pretrained(folder)
    if family != "own":
        folder = export_checkpoint(source.config, source.state_dict(), tmp_path / "source.pth", family)
    # Official files do not say how proposals are initialised, nor at what size they were tested.
    model, notes = fine_tune(tiny_config, folder, ("ship", "train"), num_proposals=count, min_size=64, max_size=96)
    assert notes[1:] == [*(note, "class_logits re-initialised in 2 stages: 3 classes in the weights, 2 in the data")]
    kept = min(count, 10)
    for name in PROPOSALS:
        given, fitted = source.state_dict()[name], model.state_dict()[name]
        assert len(fitted) == count and torch.equal(fitted[:kept], given[:kept])
    boxes, features = (model.state_dict()[name][kept:] for name in PROPOSALS)
    assert torch.equal(boxes, torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(count - kept, 4))
    if count > kept:
        assert 0.7 < features.std() < 1.3 and len(features.unique()) == features.numel()
    rest = [{k: v for k, v in other_layers(m).items() if k not in PROPOSALS} for m in (model, source)]
    assert all(equal(*rest))


def test_another_kind_of_initial_boxes_starts_all_proposals_anew(checkpoint, tiny_config):
    folder, source = checkpoint
    trained_proposals(source)
    source.save_pretrained(folder)
    model, notes = fine_tune(tiny_config, folder, ("cat", "dog", "cow"), num_proposals=14, proposal_init="tiles")
    assert notes[1:] == ["proposals: all 14 start anew (tiles boxes, random features)"]
    assert torch.equal(model.init_proposal_boxes.weight, initial_boxes("tiles", 14))
    both = model.init_proposal_features.weight[:10], source.init_proposal_features.weight
    assert (both[0] - both[1]).abs().mean() > 0.5
    rest = [{k: v for k, v in m.state_dict().items() if k not in PROPOSALS} for m in (model, source)]
    assert all(equal(*rest))


def test_a_model_with_other_proposals_trains(checkpoint, tiny_config, scenes):
    folder, _ = checkpoint
    trainer = Trainer(tiny_config(weights=str(folder), backbone=None, set={"num_proposals": 16}, steps=1))
    trainer.run()
    assert trainer.model.config.num_proposals == 16 and trainer.step == 1


def test_a_preset_takes_the_classes_of_the_data(tiny_config):
    model, notes = build_model(tiny_config(), ("cat", "dog"))
    assert model.config.class_names == ("cat", "dog") and model.config.num_proposals == 10
    assert notes == ["backbone resnet18: random weights"]


def test_auto_weights_that_are_not_there_are_a_warning(tiny_config):
    _, notes = build_model(tiny_config(backbone_weights="auto"), ("cat",))
    assert len(notes) == 1 and notes[0].startswith("warning: backbone resnet18 starts from random weights")


def test_named_backbone_weights_are_loaded_or_refused(tiny_config, tmp_path):
    source, _ = build_model(tiny_config(), ("cat",))
    torch.save(source.backbone.body.state_dict(), tmp_path / "body.pth")
    model, _ = build_model(tiny_config(backbone_weights=str(tmp_path / "body.pth")), ("cat",))
    assert all(equal(dict(model.backbone.body.state_dict()), dict(source.backbone.body.state_dict())))
    with pytest.raises(ValueError, match=r"absent\.pth"):
        build_model(tiny_config(backbone_weights=str(tmp_path / "absent.pth")), ("cat",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "huge"}, "preset: expected one of .*, got 'huge'"),
        ({"set": {"num_proposal": 3}}, r"unknown fields num_proposal \(did you mean num_proposals\?\)"),
        ({"set": {"num_proposals": "many"}}, "num_proposals: expected an integer >= 1, got 'many'"),
        ({"set": {"num_classes": 3}}, "set: num_classes comes from the data set"),
        ({"backbone": "resnet7"}, "backbone: .*'resnet7'"),
        ({"weights": "w", "backbone": "resnet18"}, "backbone: cannot be given with weights"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(tiny_config, changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(tiny_config(**changes), ("cat", "dog"))
