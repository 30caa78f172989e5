import argparse
import collections
import datetime
import gzip
import io
import pickle
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch

from mamba_vision.checkpoint import read_checkpoint, unpickle
from mamba_vision.errors import UserError


class TestSound:
    @pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
    def test_tensors(self, path, save_tensors, protocol):
        base = torch.randn(6, 4)
        types_ = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32)
        types_ += (torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64)
        tensors = {str(dtype): (base * 50).to(dtype) for dtype in types_}
        tensors |= {
            "base": base,
            "view": base[1:, ::2].t(),
            "parameter": torch.nn.Parameter(base),
            "empty": torch.empty(0, 3),
            "number": torch.tensor(7),
            "expanded": base[:1].expand(5, 4),
            "unsigned": torch.arange(3).to(torch.uint16),
        }
        save_tensors({"state_dict": tensors}, path, protocol)
        read = read_checkpoint(path)["state_dict"]
        assert list(read) == list(tensors)
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert read[name].shape == tensor.shape
            assert torch.equal(read[name], tensor), name
            assert type(read[name]) is torch.Tensor
            assert not read[name].requires_grad
        assert read["view"].stride() == tensors["view"].stride()
        read["base"].zero_()
        assert read["view"].count_nonzero() == 0  # they share a storage, as they did
        assert read["parameter"].count_nonzero() == 0

    @pytest.mark.parametrize("protocol", [2, 4, 5])
    def test_plain_data(self, path, save, protocol):
        data = {
            "array": np.arange(12, dtype=np.float32).reshape(3, 4),
            "fortran": np.arange(12).reshape(3, 4).T,
            "big endian": np.arange(3, dtype=">i4"),
            "no numbers": np.zeros((0, 2)),
            "words": np.array(["a", "bc"]),
            "scalar": np.float64(3.5),
            "truth": np.bool_(True),
            "bytes": b"\x00\xff",
            "no bytes": b"",
            "bytearray": bytearray(b"\x00\xff"),
            "list": [1, -(2**70), 2.5, None, True, "ä", 1j],
            "tuple": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
            "set": {1, "a"},
            "frozenset": frozenset([1]),
            ("key", 1): collections.OrderedDict(a=1),
        }
        save(data, path, protocol)
        read = read_checkpoint(path)
        assert list(read) == list(data)
        for name, value in data.items():
            assert type(read[name]) is type(value)
            if isinstance(value, np.ndarray):
                assert read[name].shape == value.shape
                assert (read[name] == value).all(), name
            else:
                assert read[name] == value

    def test_containers_become_plain(self, path):
        data = {
            "defaultdict": collections.defaultdict(list, a=[1]),
            "counter": collections.Counter("aab"),
            "deque": collections.deque([1, 2], 3),
        }
        torch.save(data, path)
        expected = {"defaultdict": {"a": [1]}, "counter": {"a": 2, "b": 1}, "deque": [1, 2]}
        assert read_checkpoint(path) == expected

    def test_torch_labels(self, path):
        data = {"size": torch.Size([1, 2]), "dtype": torch.half, "device": torch.device("cuda:1")}
        torch.save(data, path)
        assert read_checkpoint(path) == data

    def test_versions_of_modules_are_kept(self, path):
        state = torch.nn.BatchNorm2d(2).state_dict()
        torch.save(state, path)
        assert read_checkpoint(path)._metadata == state._metadata

    def test_python_2_pickle_of_detectron2(self, path):
        """As in Detectron2's model zoo: arrays whose bytes are strings."""
        numbers = np.array([1.5, -2.0], "<f4").tobytes()
        path.write_bytes(
            b"\x80\x02}U\x05modelcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
            b"K\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
            b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08" + numbers + b"tbs."
        )
        assert read_checkpoint(path)["model"].tolist() == [1.5, -2.0]

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_unknown_classes_become_placeholders(self, path, save, protocol):
        """Such as mmengine's, which need not be there."""
        module = types.ModuleType("absent_engine")

        class HistoryBuffer:
            def __init__(self):
                self.history = np.arange(3)
                self.statistics = {"mean": HistoryBuffer.mean}  # as mmengine's does

            def mean(self):
                raise AssertionError("this must not run")

            def __setstate__(self, state):
                raise AssertionError("this must not run")

        class ConfigDict(dict):
            def __reduce_ex__(self, _):
                return type(self), (dict(self),)

        class Log(list):
            pass

        class Level(int):
            pass

        for cls in (HistoryBuffer, ConfigDict, Log, Level):
            cls.__module__ = module.__name__
            cls.__qualname__ = cls.__name__
            setattr(module, cls.__name__, cls)
        HistoryBuffer.mean.__module__ = module.__name__
        HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
        sys.modules[module.__name__] = module
        try:
            data = {
                "history": HistoryBuffer(),
                "config": ConfigDict(a=1),
                "log": Log([1, 2]),
                "level": Level(3),
                "class": Level,
                "method": HistoryBuffer.mean,
                "args": argparse.Namespace(lr=1),
                "time": datetime.datetime(2025, 1, 1),
                "objects": np.array([None, 1], dtype=object),
                "weight": np.ones(2),
            }
            save(data, path, protocol)
        finally:
            del sys.modules[module.__name__]
        read = read_checkpoint(path)
        assert (read.pop("weight") == 1).all()
        assert all(isinstance(value, unpickle.Placeholder) for value in read.values())
        assert repr(read["history"]) == "<absent_engine.HistoryBuffer, not loaded>"
        assert module.__name__ not in sys.modules


def _tar():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights"))
    return content.getvalue()


def _zip():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return content.getvalue()


class TestUnfit:
    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "it is empty"),
            (b"<!DOCTYPE html><html>", "it is a web page"),
            (b"\n <html>", "it is a web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "Git LFS pointer"),
            (b'\x40\x00\x00\x00\x00\x00\x00\x00{"a": 1}', "safetensors"),
            (gzip.compress(b"abc"), "gunzip"),
            (_tar(), "tar archive"),
            (_zip(), "zip archive of something else"),
            (b"PK\x03\x04 and no more", "damaged"),
            (b'{"_name_or_path": 1}', "it is text"),
            (b"\xff\xd8\xff\xe0\x00\x10JFIF", "damaged"),
            (b"hello\n", "it refers to 101, which it does not hold"),
            (b"MZ\x90\x00", "damaged"),
            (bytes(100), "damaged"),
            (pickle.dumps([1], 2), "it holds a list"),
            (pickle.dumps(3, 2), "it holds a int"),
        ],
    )
    def test_other_files(self, path, content, reason):
        path.write_bytes(content)
        with pytest.raises(UserError, match=reason) as caught:
            read_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)

    def test_directory(self, tmp_path):
        with pytest.raises(UserError, match="cannot be read: Is a directory"):
            read_checkpoint(tmp_path)

    def test_missing(self, path):
        with pytest.raises(UserError, match=r"weights\.pth: cannot be read: No such file"):
            read_checkpoint(path)

    def test_whole_model(self, path):
        torch.save(torch.nn.Linear(1, 1), path)
        with pytest.raises(
            UserError, match=r"holds a whole torch\.nn.*Linear; save its state_dict"
        ):
            read_checkpoint(path)

    def test_torchscript(self, path):
        torch.jit.script(torch.nn.ReLU()).save(str(path))
        with pytest.raises(UserError, match="TorchScript"):
            read_checkpoint(path)

    def test_other_byte_order(self, path, rebuild_zip):
        torch.save({"a": torch.zeros(1)}, path)
        other = b"big" if sys.byteorder == "little" else b"little"
        rebuild_zip(path, lambda members, home: members.update({f"{home}/byteorder": other}))
        with pytest.raises(UserError, match="byte order"):
            read_checkpoint(path)


class TestDamaged:
    def test_cut_short_anywhere(self, path, save):
        save({"a": np.arange(100.0), "b": [{"c": (1, "x")}], "d": 2.5}, path)
        content = path.read_bytes()
        for end in range(1, len(content), max(1, len(content) // 97)):
            path.write_bytes(content[:end])
            with pytest.raises(UserError):
                read_checkpoint(path)

    def test_any_byte_changed(self, path, save):
        """Whatever is wrong, the outcome is a dict or a UserError, and nothing else."""
        data = {"a": np.arange(4.0), "b": [{1, 2}], "c": collections.OrderedDict(x=(1, "x"))}
        if save.__name__ != "save_pickle":
            data |= {"t": torch.arange(6.0).reshape(2, 3), "p": torch.nn.Parameter(torch.ones(2))}
        save(data, path)
        content = path.read_bytes()
        draw = np.random.default_rng(0)
        refused = 0
        for _ in range(600):
            changed = bytearray(content)
            for place in draw.integers(len(content), size=draw.integers(1, 4)):
                changed[place] = draw.integers(256)
            path.write_bytes(changed)
            try:
                assert isinstance(read_checkpoint(path), dict)
            except UserError:
                refused += 1
        assert refused > 100
