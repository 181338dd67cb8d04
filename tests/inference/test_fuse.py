"""What is folded and fused, and what must not be."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from sparse_rcnn.inference.convolution import Activation, FusedConv2d, fold_norm
from sparse_rcnn.inference.fuse import fuse
from sparse_rcnn.models.backbone import BackboneWithFPN
from sparse_rcnn.onednn import has_onednn, linear, packed

CPU = torch.device("cpu")


def fill(module: nn.Module) -> nn.Module:
    """Random weights and statistics."""
    generator = torch.Generator().manual_seed(0)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5 if tensor.dim() < 2 else
                         torch.randn(tensor.shape, generator=generator) * 0.2)  # fmt: skip
    return module.eval()


class Net(nn.Module):
    """``compute(self, images)`` as a backbone; each tensor that it reads may be written to by who fuses wrongly."""

    def __init__(self, compute, **layers):
        super().__init__()
        self.compute = compute
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, images):
        return self.compute(self, images)


def conv(inputs=4, outputs=4, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def norm(channels=4):
    return nn.BatchNorm2d(channels)


def check(net: nn.Module, channels=4, kinds=None, device=CPU):
    """The fused net computes the same; ``kinds`` counts what its graph calls besides fused convolutions."""
    fill(net)
    images = torch.randn(2, channels, 9, 12, generator=torch.Generator().manual_seed(1))
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = net(images.clone())
        fused = fuse(net, device, torch.float32)
        for _ in range(2):  # what is written in place must not be what the next call reads
            got = fused(images.clone())
            for result, want in zip(got, expected, strict=True):
                torch.testing.assert_close(result, want, rtol=1e-5, atol=1e-4)
    if kinds is not None:
        modules = dict(fused.named_modules())
        calls = Counter(
            type(modules[node.target]).__name__
            if node.op == "call_module"
            else getattr(node.target, "__name__", node.target)
            for node in fused.graph.nodes
            if node.op.startswith("call")
        )
        assert dict(calls) == kinds
    return fused


NORMS = {
    "batch": nn.BatchNorm2d(6),
    "plain": nn.BatchNorm2d(6, affine=False),
    "frozen": FrozenBatchNorm2d(6),
    "eps": nn.BatchNorm2d(6, eps=0.1),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_fold_is_exact(kind, bias):
    first, second = fill(conv(8, 6, groups=2, bias=bias)).double(), fill(NORMS[kind]).double()
    weight, shift = fold_norm(first.weight, first.bias, second)
    assert weight.dtype == torch.float64
    x = torch.randn(2, 8, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            F.conv2d(x, weight, shift, padding=1, groups=2), second(first(x)), rtol=1e-6, atol=1e-6
        )


def test_residual_block_is_two_convolutions():
    def block(self, x):
        x = self.stem(x)
        y = F.relu(self.bn1(self.conv1(x)))
        return [F.relu(self.bn2(self.conv2(y)) + x)]

    fused = check(Net(block, stem=conv(), conv1=conv(), bn1=norm(), conv2=conv(), bn2=norm()), kinds={"FusedConv2d": 3})
    last = fused.conv2
    assert last.overwrite and last.activation.name == "relu"


def test_a_shortcut_that_is_read_later_is_not_overwritten():
    def block(self, x):
        x = self.stem(x)
        y = self.conv1(x) + x
        return [y, self.conv2(x)]

    assert not check(Net(block, stem=conv(), conv1=conv(), conv2=conv()), kinds={"FusedConv2d": 3}).conv1.overwrite


def test_a_result_is_not_overwritten():
    def block(self, x):
        x = self.stem(x)
        return [x, self.conv1(x) + x]

    assert not check(Net(block, stem=conv(), conv1=conv()), kinds={"FusedConv2d": 2}).conv1.overwrite


def test_the_input_is_not_overwritten():
    net = Net(lambda self, x: [self.conv1(x) + x], conv1=conv())
    fused = check(net, kinds={"FusedConv2d": 1})
    images = torch.randn(1, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    fused(images)
    assert torch.equal(images, before)


def test_both_terms_are_convolutions():
    def block(self, x):
        return [(self.conv1(x) + self.conv2(x)).relu()]

    check(Net(block, conv1=conv(), conv2=conv()), kinds={"FusedConv2d": 2})


def test_a_sum_with_itself_and_with_a_number_stay():
    def block(self, x):
        y, z = self.conv1(x), self.conv2(x)
        return [y + y, z + 1.5]

    check(Net(block, conv1=conv(), conv2=conv()), kinds={"FusedConv2d": 2, "add": 2})


def test_what_two_read_is_not_fused():
    def block(self, x):
        y = self.conv1(x)
        return [self.bn1(y), F.relu(y)]

    check(Net(block, conv1=conv(), bn1=norm()), kinds={"FusedConv2d": 1, "BatchNorm2d": 1, "relu": 1})


def test_layers_used_twice_are_left():
    def block(self, x):
        return [self.bn1(self.conv1(self.bn1(self.conv1(x))))]

    check(Net(block, conv1=conv(), bn1=norm()), kinds={"Conv2d": 2, "BatchNorm2d": 2})


def test_a_norm_without_a_convolution_stays():
    check(Net(lambda self, x: [self.bn1(x)], bn1=norm()), kinds={"BatchNorm2d": 1})


ACTIVATIONS = [
    *(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.5, 0.7), nn.SiLU(), nn.Hardswish(), nn.Sigmoid()),
    *(nn.GELU(), nn.GELU("tanh")),
]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=repr)
def test_activations(act):
    kinds = {"FusedConv2d": 1}
    fused = check(
        Net(lambda self, x: [self.act(self.bn1(self.conv1(x)))], conv1=conv(), bn1=norm(), act=act), kinds=kinds
    )
    assert fused.conv1.activation.module is act


def test_only_a_relu_is_fused_behind_a_sum():
    def block(self, x):
        return [self.act(self.conv1(x) + x)]

    check(Net(block, conv1=conv(), act=nn.SiLU()), kinds={"FusedConv2d": 1, "SiLU": 1})


def test_unknown_activations_stay():
    check(
        Net(lambda self, x: [self.act(self.conv1(x))], conv1=conv(), act=nn.Softplus()),
        kinds={"FusedConv2d": 1, "Softplus": 1},
    )


def test_what_does_nothing_is_dropped():
    net = Net(
        lambda self, x: [self.drop(self.same(self.conv1(x)))], conv1=conv(), same=nn.Identity(), drop=nn.Dropout()
    )
    check(net, kinds={"FusedConv2d": 1})


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2}, {"groups": 4}, {"bias": False}], ids=str)
def test_kinds_of_convolutions(options):
    check(Net(lambda self, x: [self.conv1(x)], conv1=conv(**options)), kinds={"FusedConv2d": 1})


def test_convolutions_that_pad_otherwise_are_left():
    check(Net(lambda self, x: [self.conv1(x)], conv1=conv(padding_mode="reflect")), kinds={"Conv2d": 1})


@pytest.mark.parametrize("size", [(9, 12), (8, 8), (7, 30), (1, 2)], ids=str)
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (3, 1, 2), (2, 2, 1), (1, 2, 1)])
@pytest.mark.parametrize("groups", [1, 4])
def test_padding_of_tensorflow(size, kernel, stride, dilation, groups):
    layers = pytest.importorskip("timm.layers")
    same = fill(layers.Conv2dSame(4, 8, kernel, stride=stride, dilation=dilation, groups=groups))
    fused = FusedConv2d(same, None, CPU, torch.float32)
    x = torch.randn(2, 4, *size).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), same(x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not has_onednn(torch.float32), reason="oneDNN's fused convolutions are not in this build")
@pytest.mark.parametrize("kernel", [3, 5])
def test_even_maps_are_not_copied_for_depthwise_padding(kernel, monkeypatch):
    layers = pytest.importorskip("timm.layers")
    same = fill(layers.Conv2dSame(4, 4, kernel, stride=2, groups=4))
    fused = FusedConv2d(same, None, CPU, torch.float32)
    x = torch.randn(2, 4, 8, 12).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = same(x)
        monkeypatch.setattr(F, "pad", None)
        torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_sums_of_the_pyramid_are_fused():
    backbone = fill(BackboneWithFPN("resnet18", 16))
    fused = fuse(backbone, CPU, torch.float32)
    names = [node.target for node in fused.graph.nodes if node.op == "call_function"]
    assert F.interpolate in names and torch.add not in names
    # All sums but the first block's, whose shortcut is the pooling's result: seven, and the pyramid's three.
    assert sum(module.overwrite for module in fused.modules() if isinstance(module, FusedConv2d)) == 7 + 3
    images = torch.randn(1, 3, 64, 96)
    for got, want in zip(fused(images.contiguous(memory_format=torch.channels_last)), backbone(images), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (0, 8), (2, 0, 8)], ids=str)
def test_linear(shape, bias, relu):
    x, weight, shift = torch.randn(*shape), torch.randn(6, 8), torch.randn(6) if bias else None
    expected = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
    torch.testing.assert_close(
        linear(x, weight, shift, relu).double(), expected.relu() if relu else expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.skipif(not has_onednn(torch.float32), reason="oneDNN's fused operators are not in this build")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 100])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 6), (33, 129), (256, 1024)])
def test_linear_of_packed_weights(rows, inputs, outputs, bias, relu):
    x, weight = torch.randn(2, rows, inputs), torch.randn(outputs, inputs)
    shift = torch.randn(outputs) if bias else None
    layout = packed(weight, 7)
    assert layout.is_mkldnn
    torch.testing.assert_close(linear(x, layout, shift, relu), linear(x, weight, shift, relu), rtol=1e-6, atol=1e-5)


def convolve_and(relu_of, calls):
    """What cuDNN's fused convolutions compute; they take no CPU tensors."""

    def convolution_relu(x, weight, bias, stride, padding, dilation, groups):
        calls.append("relu")
        return relu_of(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    def convolution_add_relu(x, weight, residual, alpha, bias, stride, padding, dilation, groups):
        calls.append("add_relu")
        assert alpha == 1
        return relu_of(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + residual)

    return convolution_relu, convolution_add_relu


def residual_net():
    def block(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return [F.relu(self.conv2(y) + y), self.conv3(y)]

    return Net(block, conv1=conv(stride=2), bn1=norm(), conv2=conv(groups=2), conv3=conv())


@pytest.mark.parametrize("works", [True, False])
@torch.inference_mode()
def test_cudnn_serves_where_it_can(monkeypatch, works):
    calls = []

    def relu(x):
        if not works:
            raise RuntimeError("no engine found")
        return x.relu()

    for name, function in zip(("relu", "add_relu"), convolve_and(relu, calls), strict=True):
        monkeypatch.setattr(torch, f"cudnn_convolution_{name}", function)
    net = fill(residual_net())
    fused, images = (
        fuse(net, CPU, torch.float32),
        torch.randn(2, 4, 9, 12).contiguous(memory_format=torch.channels_last),
    )
    for module in fused.modules():
        if isinstance(module, FusedConv2d):
            module.onednn, module.cudnn = False, True
    for _ in range(2):
        for got, want in zip(fused(images), net(images), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    assert calls == ["relu", "add_relu"] * (2 if works else 1)


def test_out_of_memory_is_not_taken_for_a_missing_engine(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", full)
    layer = FusedConv2d(conv(), None, CPU, torch.float32)
    layer.activation, layer.onednn, layer.cudnn = Activation.of(nn.ReLU()), False, True
    with pytest.raises(torch.OutOfMemoryError), torch.inference_mode():
        layer(torch.randn(1, 4, 5, 5))
    assert layer.cudnn
