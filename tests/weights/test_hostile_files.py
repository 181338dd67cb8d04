"""Files that want to run code, damaged files, and files of other kinds: each is a ValueError that names the file."""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import operator
import os
import pathlib
import pickle
import random
import runpy
import shutil
import struct
import subprocess
import sys
import timeit
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparse_rcnn.weights import load_pretrained, safe_load
from sparse_rcnn.weights.safe_load import tensors


class Call:
    """Pickles as a call of ``function``, which runs when a plain unpickler reads it."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments

    def __call__(self):
        raise AssertionError("only here because pickle wants a callable")


def gadget(name, marker):
    """A call that creates the file ``marker``, by way of ``name``."""
    touch, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    script = marker.with_name("script.py")
    script.write_text(code)
    legacy, array = io.BytesIO(), marker.with_name("array.npy")
    torch.save(Call(os.system, touch), legacy, _use_new_zipfile_serialization=False)
    np.save(array, np.array([Call(os.system, touch)], dtype=object))
    system = Call(getattr, Call(importlib.import_module, "os"), "system")
    return {
        "os.system": Call(os.system, touch),
        "os.spawnlp": Call(os.spawnlp, os.P_WAIT, "touch", "touch", str(marker)),
        "os.mknod": Call(os.mknod, str(marker)),
        "subprocess.call": Call(subprocess.call, ["touch", str(marker)]),
        "subprocess.check_output": Call(subprocess.check_output, ["touch", str(marker)]),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(marker), "w"),
        "getattr": Call(system, touch),
        "__import__": Call(Call(getattr, Call(builtins.__import__, "os"), "system"), touch),
        "map": Call(list, Call(map, os.system, [touch])),
        "pathlib": Call(pathlib.Path.touch, pathlib.Path(marker)),
        "runpy": Call(runpy.run_path, str(script)),
        "shutil": Call(shutil.copy, str(script), str(marker)),
        "timeit": Call(timeit.timeit, code, "pass", timeit.default_timer, 1),
        "partial": Call(functools.partial(os.system, touch)),
        "methodcaller": Call(operator.methodcaller("system", touch), Call(importlib.import_module, "os")),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
        "torch.load": Call(functools.partial(torch.load, weights_only=False), Call(io.BytesIO, legacy.getvalue())),
        "torch.storage": Call(torch.storage._load_from_bytes, legacy.getvalue()),
        "numpy.load": Call(np.load, str(array), None, True),
    }[name]


GADGETS = (
    *("os.system", "os.spawnlp", "os.mknod", "subprocess.call", "subprocess.check_output", "eval", "exec", "open"),
    *("getattr", "__import__", "map", "pathlib", "runpy", "shutil", "timeit", "partial", "methodcaller"),
    *("pickle.loads", "torch.load", "torch.storage", "numpy.load"),
)


def hide(call, place):
    """``call`` somewhere in what is otherwise an official checkpoint."""
    model = {"head.head_series.0.norm1.weight": np.ones(4, np.float32)}
    if place == "value":
        return {"model": {**model, "head.head_series.0.norm1.bias": call}}
    if place == "optimizer":
        return {"model": model, "optimizer": {"state": [{"deep": [(1, call)]}]}}
    if place == "argument":
        return {"model": {**model, "x": Call(torch._utils._rebuild_tensor_v2, call, 0, (1,), (1,), False, None)}}
    return call


PLACES = ("value", "optimizer", "argument", "top")


def write_zip(content, path):
    torch.save(content, path)


def write_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_protocol_2(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


def write_protocol_5(content, path):
    path.write_bytes(pickle.dumps(content, protocol=5))


FORMS = {
    "zip.pth": write_zip,
    "legacy.pt": write_legacy,
    "raw.pth": write_protocol_2,
    "protocol2.pkl": write_protocol_2,
    "protocol5.pkl": write_protocol_5,
}


@pytest.mark.parametrize("name", GADGETS)
def test_nothing_in_a_file_is_executed(name, tmp_path):
    marker = tmp_path / "executed"
    call = gadget(name, marker)
    pickle.loads(pickle.dumps(call, protocol=2))
    assert marker.exists(), "the gadget does nothing: this test would prove nothing"
    marker.unlink()
    for index, (form, write) in enumerate(FORMS.items()):
        path = tmp_path / form
        write(hide(call, PLACES[(index + len(name)) % len(PLACES)]), path)
        with pytest.raises(ValueError) as error:
            load_pretrained(path)
        assert str(path) in str(error.value) and "expected a checkpoint" in str(error.value)
        assert "\n" not in str(error.value)
        assert not marker.exists()


def test_a_pickle_cannot_change_the_reader(tmp_path):
    """BUILD on a stand-in itself would leave a mark on every later reading."""
    for name in (b"numpy\nndarray\n", b"numpy.core.multiarray\n_reconstruct\n", b"collections\nOrderedDict\n"):
        path = tmp_path / "build.pkl"
        path.write_bytes(b"\x80\x02c" + name + b"N}X\x04\x00\x00\x00evilK\x01s\x86b.")
        with pytest.raises(ValueError, match="sets the state of a"):
            safe_load(path)


BOMBS = {
    "memo index": b"\x80\x02}r\xff\xff\xff\xff",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "long": b"\x80\x02\x8b" + struct.pack("<i", -5) + b"x.",
    "nested key": b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.",
    "nested value": b"\x80\x02]" + b"]" * 100_000 + b"a" * 100_000 + b".",
    "stack underflow": b"\x80\x02sssss.",
    "no stop": b"\x80\x02}}}}",
    "unhashable key": b"\x80\x02}]K\x01s.",
    "set": b"\x80\x04\x8f(K\x01\x90.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent id": b"\x80\x02K\x01Q.",
    "unknown opcode": b"\x80\x02\xff.",
    "instance": b"(S'true'\nios\nsystem\n.",
    "protocol": b"\x80\x63}.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_only_harm(name, tmp_path):
    path = tmp_path / "bomb.pkl"
    path.write_bytes(BOMBS[name])
    with pytest.raises(ValueError, match="bomb.pkl: expected a checkpoint"):
        load_pretrained(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_deeply_nested_key_does_not_overflow_the_stack_of_torch_load(compressed, tmp_path):
    bomb = BOMBS["nested key"]
    path = tmp_path / "bomb.pth"
    path.write_bytes(bomb)
    with pytest.raises(ValueError, match="bomb.pth: .* more than 50000 tuples"):
        load_pretrained(path)
    torch.save({"model": 1}, tmp_path / "whole.pth")
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(path, "w", method) as changed:
        for name in whole.namelist():
            changed.writestr(name, bomb if name.endswith("data.pkl") else whole.read(name))
    with pytest.raises(ValueError, match="bomb.pth: .* more than 50000 tuples"):
        load_pretrained(path)


def array_pickle(**changes):
    """The pickle of an array of four float32, with other parts."""
    parts = {"shape": (4,), "code": "f4", "order": "<", "data": b"\0" * 16, **changes}
    dtype = [Call(np.dtype, parts["code"], False, True), (3, parts["order"], None, None, None, -1, -1, 0)]

    class Dtype:
        def __reduce__(self):
            return (*dtype[0].__reduce__(), dtype[1])

    class Array:
        def __reduce__(self):
            state = (1, parts["shape"], Dtype(), False, parts["data"])
            return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state

    # pickle looks at the protocol of the arguments only, not at what they mean.
    return pickle.dumps({"model": {"head.head_series.0.norm1.weight": Array()}}, protocol=2)


def test_array_parts_are_checked(tmp_path):
    path = tmp_path / "array.pkl"
    path.write_bytes(array_pickle())
    assert torch.equal(tensors(safe_load(path)["model"], path)["head.head_series.0.norm1.weight"], torch.zeros(4))
    for changes, message in [
        ({"shape": (5,)}, "16 bytes do not make"),
        ({"shape": (-1,)}, "16 bytes do not make"),
        ({"shape": (-2, -2)}, "16 bytes do not make"),
        ({"shape": (2**63, 2**63)}, "16 bytes do not make"),
        ({"shape": 4}, "not an array"),
        ({"shape": None}, "not an array"),
        ({"code": "O"}, "elements of type 'O'"),
        ({"code": "V16"}, "elements of type 'V16'"),
        ({"order": "x"}, "expected a byte order"),
        ({"data": None}, "not an array"),
        ({"data": [1, 2, 3, 4]}, "do not make"),
    ]:
        path.write_bytes(array_pickle(**changes))
        with pytest.raises(ValueError, match=message) as error:
            load_pretrained(path)
        assert f"{path}: expected named tensors; head.head_series.0.norm1.weight: " in str(error.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_form_are_read(protocol, tmp_path):
    values = np.arange(24.0).reshape(2, 3, 4)
    arrays = {
        **{kind: values.astype(kind) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")},
        "big endian": values.astype(">f4"),
        "fortran": np.asfortranarray(values),
        "strided": values[:, ::2],
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "nan": np.array([np.nan, np.inf], np.float32),
    }
    path = tmp_path / "arrays.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "ratio": np.float64(0.5)}, protocol=protocol))
    read = tensors(safe_load(path)["model"], path)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name].numpy(), array)
        assert read[name].numpy().dtype == array.dtype.newbyteorder("="), name


def small_files(folder):
    """One whole file of each kind, of an official checkpoint with a single tensor."""
    state = {"head.head_series.0.norm1.weight": torch.arange(6.0)}
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    torch.save({"model": state}, folder / "zip.pth")
    torch.save({"model": state}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "array.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol=4))
    save_file(state, folder / "own.safetensors")
    return [folder / name for name in ("zip.pth", "legacy.pt", "array.pkl", "own.safetensors")]


def test_damaged_files(tmp_path):
    """Cut at any place, or with any byte changed: read, or refused, and never another exception."""
    generator = random.Random(0)
    for path in small_files(tmp_path):
        whole = path.read_bytes()
        assert safe_load(path)
        for _ in range(25):
            path.write_bytes(whole[: generator.randrange(len(whole) // 2)])
            with pytest.raises(ValueError, match=f"{path.name}: expected a checkpoint"):
                safe_load(path)
        for _ in range(100):
            damaged = bytearray(whole)
            for _ in range(generator.randrange(1, 8)):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            path.write_bytes(damaged)
            with pytest.raises(ValueError) as error:  # even if it can be read, it is no whole detector
                load_pretrained(path)
            assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pkl", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(60)])
def test_other_files(suffix, content, tmp_path):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"file{suffix}: expected a checkpoint .*{'empty' if not content else ''}"):
        load_pretrained(path)


def test_missing_files_and_folders(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "text.txt").write_text("x")
    for name, message in [
        ("missing.pth", "there is no such file"),
        ("missing", "got the suffix ''"),
        ("text.txt", "got the suffix '.txt'"),
        ("folder.pth", "expected a directory with model.safetensors and config.json, no model.safetensors"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            load_pretrained(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(ValueError, match="it is not a file"):
        safe_load(tmp_path / "folder.pth")


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "it holds a list instead of a dict"),
        (torch.ones(3), "it holds a Tensor instead of a dict"),
        ({}, "expected a Sparse R-CNN checkpoint"),
        ({"model": {}}, "it holds 'model'"),
        ({"model": {"backbone.conv1.weight": torch.ones(3)}}, "it holds 'model'"),
        ({"roi_head.bbox_head.0.fc_cls.weight": torch.ones(3)}, "expected a Sparse R-CNN checkpoint"),
        ({"model": {"head.head_series.0.x": 3, "y": None}}, "head.head_series.0.x: got a int; y: got a NoneType"),
        ({"head.head_series.0.x": torch.eye(2).to_sparse()}, "x: got a torch.sparse_coo tensor"),
        ({"head.head_series.0.x": torch.empty(2, device="meta")}, "x: got a torch.strided tensor on meta"),
        ({"head.head_series.0.x": torch.ones(2), 5: torch.ones(2)}, "5: the name is a int"),
        ({"head.head_series.0.x": torch.ones(2)}, "missing init_proposal_boxes.weight"),
        ({"head.head_series.99999999.class_logits.weight": torch.ones(2)}, "num_stages 100000000 in a file of 1"),
        ({"head.head_series.0.norm2.weight": torch.ones(9)}, "num_heads: expected a divisor of hidden_dim 9"),
    ],
)
def test_other_contents(content, message, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(tmp_path / "weights.pth")
    assert str(tmp_path / "weights.pth") in str(error.value)


def test_logs_of_an_mmdet_training_are_passed_over(tmp_path, monkeypatch):
    """mmengine leaves objects of its own, with their methods and numpy arrays, beside the weights."""

    class HistoryBuffer:
        def __init__(self):
            self._log_history = np.arange(3.0)

        def mean(self):
            return 0.0

        def __getstate__(self):
            return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}

    module = types.ModuleType("mmengine.logging.history_buffer")
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = {"roi_head.bbox_head.0.fc_cls.weight": torch.arange(3.0)}
    log = {"log_scalars": {"loss": HistoryBuffer()}, "runtime_info": {"lr": np.float64(0.1), "epoch": np.int64(3)}}
    torch.save({"state_dict": state, "message_hub": log}, tmp_path / "epoch_1.pth")
    monkeypatch.delitem(sys.modules, module.__name__)
    read = safe_load(tmp_path / "epoch_1.pth")
    assert torch.equal(read["state_dict"]["roi_head.bbox_head.0.fc_cls.weight"], torch.arange(3.0))
    assert not isinstance(read["message_hub"]["log_scalars"]["loss"], HistoryBuffer)
