"""The parts of the whole-image benchmark that can be wrong without showing it: peer, floors, picture, rows."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from xml.etree import ElementTree

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import model as benchmark
from benchmarks import model_worker
from benchmarks.components import Component, components
from benchmarks.compression import measure, table
from benchmarks.model import PEERS, _ratios, gate
from benchmarks.picture import draw
from benchmarks.sync_free import forward, roi_align, sync_free
from sparse_rcnn.inference.convolution import FusedConv2d, has_winograd
from sparse_rcnn.ops.multiscale_roi_align import multiscale_roi_align_reference
from tests.inference.test_optimized import make_images, make_model

STRIDES = (4, 8, 16, 32)


@pytest.mark.parametrize("level_rule", ["detectron2", "mmdet"])
def test_the_compiled_peers_roi_align_is_the_reference(level_rule):
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 8, 256 // s, 320 // s, generator=generator).double() for s in STRIDES]
    corner = torch.rand(2, 40, 2, generator=generator) * 300 - 20
    boxes = torch.cat([corner, corner + 2 ** (8 * torch.rand(2, 40, 2, generator=generator))], dim=2).double()
    boxes[0, 0] = torch.tensor([50.0, 60.0, 40.0, 90.0])  # of negative area
    boxes[1, 1] = torch.tensor([-500.0, -500.0, -400.0, -450.0])  # outside
    found = roi_align(features, boxes, STRIDES, 7, 2, level_rule)
    expected = multiscale_roi_align_reference(features, boxes, STRIDES, 7, 2, level_rule)
    # In float64: of values of about 1, a million times what the order of summation can change.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@torch.inference_mode()
def test_the_compiled_peer_is_one_graph_and_gives_the_detectors_results():
    model, images, graphs = make_model(num_stages=2), make_images((64, 96), (50, 60)), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    batch, sizes = model._normalize(images)
    with sync_free():
        run = torch._dynamo.optimize(backend, nopython=True, dynamic=False)(forward(model))
        logits, boxes, scores = run(batch, sizes)
    assert len(graphs) == 1
    expected = model(images, return_stages=True)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(boxes, expected.boxes, rtol=2e-5, atol=2e-3)
    torch.testing.assert_close(scores[0], expected.logits[-1, 0].sigmoid().flatten().topk(12).values, atol=1e-5, rtol=0)


def saved_flops(backbone, batch):
    """Those of 6.75 of the 9 products of a cell and a pair of channels, which Winograd's filtering needs not."""
    found = []

    def count(layer, _, result):
        pieces, _, inputs, together = layer.weight.shape
        found.append(2 * 6.75 * inputs * pieces * together * result[:, 0].numel())

    layers = [part for part in backbone.modules() if isinstance(part, FusedConv2d) and part.winograd]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    backbone(batch)
    for hook in hooks:
        hook.remove()
    return sum(found)


@torch.inference_mode()
def test_components_count_what_the_detector_computes():
    model, images = make_model(), make_images((64, 96))
    program, sizes = model.optimize()._program, torch.tensor([[64, 96, 64, 96]])
    steps = components(program, images, sizes, (64, 96))
    names = ["stem", "res2", "res3", "res4", "res5", "FPN"]
    assert list(steps) == [
        *("preprocessing", *names, "attention", "dynamic_layer", "interaction", "out_layer, FFN"),
        *("towers, boxes", "selection"),
    ]
    with FlopCounterMode(display=False) as counter:
        model.backbone(model._normalize(images)[0])
    saved = saved_flops(program.backbone, program.normalize(images, sizes, (64, 96)))
    assert saved > 0 or not has_winograd()
    assert sum(steps[name].gflop for name in names) == pytest.approx((counter.get_total_flops() - saved) / 1e9)
    N, C, D, P, F = 12, 32, 16, 49, 64
    assert steps["dynamic_layer"].gflop == pytest.approx(2 * 2 * N * C * 2 * C * D / 1e9)  # of two stages
    assert steps["interaction"].gflop == pytest.approx(3 * 4 * N * P * C * D / 1e9)
    assert steps["out_layer, FFN"].gflop == pytest.approx(3 * 2 * N * (P * C * C + 2 * C * F) / 1e9)
    before = program(images, sizes, (64, 96))
    for step in steps.values():
        step.call()
        step.call()
    after = program(images, sizes, (64, 96))  # none of them spoils what the others read
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@torch.inference_mode()
def test_a_backbone_in_one_piece():
    model, images = make_model(backbone="mobilenetv3_small_050"), make_images((64, 96))
    steps = components(model.optimize()._program, images, torch.tensor([[64, 96, 64, 96]]), (64, 96))
    assert "backbone+FPN" in steps and "res2" not in steps


def test_floor_is_the_larger_of_two_times_an_operation():
    component = Component(print, [(100.0, 1.0), (1.0, 100.0)])
    assert component.floor(flop_per_s=50.0, bytes_per_s=10.0) == 100 / 50 + 100 / 10
    assert component.gflop == 101 / 1e9


def make_report():
    def row(seconds, floor):
        return {"seconds": {"median": seconds}, "floor_s": floor, "gflop": 1.0}

    figures = {"components": {"stem x1": row(0.1, 0.05), "out_layer, FFN x1": row(0.3, 0.1)}}
    environment = {"processor": "A & B", "isa": "AVX9", "threads": 2, "torch": "2.99.0"}
    rows = {"reference": {"components": {}}, "optimized, float32": figures}
    return {"preset": "r50_300", "size": [800, 1333], "environment": environment, "implementations": rows}


def test_widths_of_the_picture_are_times():
    root = ElementTree.fromstring(draw(make_report()))
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(r.get("width")) for r in root.iter(f"{space}rect") if r.find(f"{space}title") is not None]
    assert widths == pytest.approx([widths[0], 3 * widths[0], widths[0] / 2, widths[0]], abs=0.2)
    texts = [text.text for text in root.iter(f"{space}text")]
    assert {"float32", "its floor", "400 ms", "150 ms", "stem", "out_layer, FFN"} <= set(texts)
    assert any("A & B" in text for text in texts)


def test_gates_of_exact_and_of_half_types():
    def outputs(error):
        return {"logits": torch.full((2, 2), error), "boxes": torch.full((2, 2), error)}

    names = {"reference": 0.0, model_worker.AUTOCAST: 0.1, "optimized, float32": 2e-3, "optimized, bfloat16": 0.15}
    rows = gate({name: outputs(error) for name, error in names.items()} | {model_worker.PEER: {}})
    assert {name: row["passed"] for name, row in rows.items()} == {
        "optimized, float32": False,
        "optimized, bfloat16": True,
    }
    assert gate({"reference": outputs(0.0), "native kernels": outputs(5e-4)})["native kernels"]["passed"]
    assert model_worker.KEPT in PEERS["cpu"] and model_worker.KEPT not in PEERS["cuda"]


def test_ratios_are_of_the_same_round():
    assert _ratios({"whole": [4.0, 9.0, 5.0]}, {"whole": [2.0, 3.0, 5.0], "head": [1.0] * 3}) == {"whole": 2.0}


def test_on_a_cpu_large_batches_are_timed_one_implementation_after_the_other(monkeypatch):
    class Process:
        alive = 0

        def __init__(self, name, batches):
            self.batches, self.speed, self.asked = batches, speeds.get(name, 1), 0
            self.start_up = next(start_ups[name])

        def ask(self, message):
            if message == "parts":
                return ["whole" if count == 1 else f"whole x{count}" for count in self.batches]
            if message in ("peak", "floors"):
                return {"peak": 1.5, "floors": {}}[message]
            count = int(message.partition(" x")[2] or 1)
            assert count in self.batches and (Process.alive == 1) == (count > 4)
            self.asked += 1
            if count == 32 and self.speed == 4:
                raise RuntimeError("a worker broke")
            return (count + self.asked / 1024) / self.speed

        def gate(self):
            return {"logits": torch.zeros(2), "boxes": torch.zeros(2)}

    @contextlib.contextmanager
    def start(module, name, folder, *flags):
        Process.alive += 1
        yield Process(name, flags[flags.index("--batches") + 1 :])
        Process.alive -= 1

    monkeypatch.setattr(benchmark, "start", start)
    speeds = {"reference": 1, "native kernels": 3, "optimized, float32": 2, model_worker.AUTOCAST: 4}
    start_ups = {name: iter((9.0, 3.0, 5.0 + speed, 99.0)) for name, speed in speeds.items()}
    report = benchmark.measure("small", torch.device("cpu"), (64, 96), [1, 4, 16, 32], 2, list(speeds))
    found = {name: figures["parts"] for name, figures in report["implementations"].items()}
    assert list(found["native kernels"]) == ["whole", "whole x4"]
    assert list(found[model_worker.AUTOCAST]) == ["whole", "whole x4", "whole x16"]  # one that did not fit
    for name in ("reference", "optimized, float32"):
        parts, speed = found[name], speeds[name]
        assert list(parts) == ["whole", "whole x4", "whole x16", "whole x32"]
        # Timed are the answers after the first of each: 4 and 6, then 2 and 3, then 5 and 6.
        assert parts["whole x4"]["median"] == (4 + 5 / 1024) / speed
        assert parts["whole x16"]["median"] == (16 + 2.5 / 1024) / speed
        assert parts["whole x32"]["median"] == (32 + 5.5 / 1024) / speed
    assert report["implementations"]["optimized, float32"]["ratios"] == dict.fromkeys(parts, 2.0)
    # Of three starts, not of one more for the large batches.
    assert {name: report["implementations"][name]["start_up_s"] for name in speeds} == {
        name: min(9.0, 5.0 + speed) for name, speed in speeds.items()
    }


def test_compression_reports_errors_and_times():
    options = Namespace(device=torch.device("cpu"), dtype="float32", size=(64, 96), ranks=[8, 32], runs=2)
    with torch.inference_mode():
        rows = measure(make_model(), options)
    assert list(rows) == ["exact", "rank 8", "rank 32", "FP8", "rank 32, FP8"]
    assert rows["exact"]["score_max"] == 0
    assert rows["rank 8"]["score_mean"] > 10 * rows["rank 32"]["score_mean"] and rows["FP8"]["score_mean"] > 1e-5
    assert rows["rank 32"]["kept"] == pytest.approx(1) and 0.2 < rows["rank 8"]["kept"] < 0.9
    assert rows["exact"]["ratio"] == {"layers": 1.0, "head": 1.0}
    assert len(list(table(rows))) == 6


@torch.inference_mode()
def test_workers_answer(tmp_path, monkeypatch):
    def compile(function, **options):
        assert options == {"mode": "max-autotune", "dynamic": False}
        return torch._dynamo.optimize("eager", dynamic=False)(function)

    monkeypatch.setattr(torch, "compile", compile)
    make_model().save_pretrained(tmp_path / "model")
    outputs, parts = {}, {}
    for name in ("reference", model_worker.AUTOCAST, model_worker.COMPILED, "optimized, float32"):
        worker = model_worker.Worker(name, str(tmp_path / "model"), torch.device("cpu"), (64, 96), [1, 2])
        assert worker.answer("peak") > 0.1
        assert worker.answer(f"gate {tmp_path / 'outputs.pt'}") is True
        outputs[name] = torch.load(tmp_path / "outputs.pt")
        parts[name] = worker.answer("parts")
        assert all(worker.answer(part) > 0 for part in parts[name])
        floors = worker.answer("floors")
        assert set(floors) <= set(parts[name]) and bool(floors) == name.startswith("optimized")
    assert parts["reference"] == ["whole", "whole x2", "backbone+FPN", "head"]
    assert parts[model_worker.COMPILED] == ["whole", "whole x2"]
    assert {"whole", "whole x2", "backbone+FPN", "head", "stem x1", "selection x1"} <= set(parts["optimized, float32"])
    rows = gate(outputs)
    assert rows["optimized, float32"]["passed"] and rows["optimized, float32"]["logits_max"] < 1e-4
    assert 0 < rows[model_worker.COMPILED]["logits_mean"] < 0.1
