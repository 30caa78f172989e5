import pickle
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from mamba_vision.checkpoint import read_checkpoint, unpickle
from mamba_vision.checkpoint.builders import Storage, rebuild_tensor
from mamba_vision.errors import UserError


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A file that the tested pickles would make."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "trap"
    assert not (tmp_path / "trap").exists()


class TestHostile:
    @pytest.mark.parametrize("protocol", [2, 4])
    @pytest.mark.parametrize(
        "call",
        [
            Call(__import__("os").system, "touch trap"),
            Call(eval, "open('trap', 'w')"),
            Call(exec, "open('trap', 'w')"),
            Call(open, "trap", "w"),
            Call(__import__, "antigravity"),
            Call(getattr, "", "join"),
            Call(map, print, [1]),
            Call(subprocess.Popen, ["touch", "trap"]),
            Call(subprocess.check_output, ["touch", "trap"]),
            Call(pickle.loads, b"cos\nsystem\n(S'touch trap'\ntR."),
            Call(torch.load, "other.pth"),
            Call(torch.hub.load, "a", "b"),
            Call(np.save, "trap", 1),
        ],
        ids=lambda call: call.call[0].__name__,
    )
    def test_calls_are_refused(self, path, save, protocol, call, trap):
        save({"meta": call, "state_dict": {}}, path, protocol)
        with pytest.raises(UserError, match=r"weights\.pth: refused, and nothing in it was run"):
            read_checkpoint(path)

    @pytest.mark.parametrize(
        "program",
        [
            b"cos\nsystem\n(S'touch trap'\ntR.",
            b"cposix\nsystem\n(S'touch trap'\ntR.",
            b"(S'touch trap'\nios\nsystem\n.",
            b"(cos\nsystem\nS'touch trap'\no.",
            b"\x80\x02cos\nsystem\nU\x0atouch trap\x85\x81.",
            b"cnumpy\nos.system\n(S'touch trap'\ntR.",
            b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x0atouch trap\x85R.",
            b"cnumpy.testing._private.utils\nrunstring\n(S'1'\n}tR.",
            b"cdetectron2.utils.env\nsetup_environment\n(tR.",
            b"ctorch\n__builtins__\n.",
            b"c__main__\n__builtins__.eval\n(S'1'\ntR.",
            b"ccommands\ngetoutput\n(S'touch trap'\ntR.",
            b"cabsent\nBox\n(tR(S'x'\ntR.",  # a call of what a call gave
            b"(S'x'\n(tR.",
            b"c__builtin__\ngetattr\n(cabsent\nBox\nS'system'\ntR(S'touch trap'\ntR.",
            b"c__builtin__\ngetattr\n(cabsent\nBox\nS'__subclasses__'\ntR.",
            b"c__builtin__\ngetattr\n(cabsent\nmodule\nS'os'\ntR.",
        ],
    )
    def test_handwritten_programs_are_refused(self, path, program, trap):
        path.write_bytes(program)
        with pytest.raises(UserError, match="refused"):
            read_checkpoint(path)

    def test_nothing_is_imported(self, path):
        path.write_bytes(b"}S'a'\ncantigravity.flying\nMachine\n(tRs.")
        before = set(sys.modules)
        with pytest.raises(UserError, match="refused"):
            read_checkpoint(path)
        path.write_bytes(b"}S'a'\nctorch.testing._internal.common_cuda\nThing\n(tRs.")
        assert repr(read_checkpoint(path)["a"]).startswith("<torch.testing._internal")
        assert set(sys.modules) == before

    def test_the_closed_list_cannot_be_changed(self, path):
        """BUILD sets attributes of whatever is on the stack, functions included."""
        for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"):
            path.write_bytes(target + b"(N}S'__defaults__'\n)stb.")
            with pytest.raises(UserError, match="sets attributes of a"):
                read_checkpoint(path)


class TestBombs:
    def test_too_many_steps(self, path, monkeypatch):
        monkeypatch.setattr(unpickle, "MAX_STEPS", 1000)
        path.write_bytes(pickle.dumps({"a": [[] for _ in range(2000)]}))
        with pytest.raises(UserError, match="more than 1,000 steps"):
            read_checkpoint(path)

    def test_compressed_archive(self, path):
        torch.save({"a": torch.zeros(10)}, path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content + bytes(10**6))
        with pytest.raises(UserError, match="compressed, which PyTorch's never is"):
            read_checkpoint(path)

    def test_overlapping_members(self, path):
        torch.save({"a": torch.zeros(1000)}, path)
        with zipfile.ZipFile(path, "a") as archive:
            original = next(info for info in archive.infolist() if "/data/0" in info.filename)
            for copy in range(20):
                twin = zipfile.ZipInfo(f"{original.filename}{copy}")
                for field in ("header_offset", "file_size", "compress_size", "CRC"):
                    setattr(twin, field, getattr(original, field))
                archive.filelist.append(twin)
                archive.NameToInfo[twin.filename] = twin
            archive._didModify = True
        with pytest.raises(UserError, match="claims to hold more than the file does"):
            read_checkpoint(path)

    def test_huge_storage_in_an_archive(self, path, rebuild_zip):
        torch.save({"a": torch.zeros(1000)}, path)

        def enlarge(members, home):
            name = f"{home}/data.pkl"
            members[name] = members[name].replace(b"M\xe8\x03t", b"J\x00\x00\x00\x7ft")

        rebuild_zip(path, enlarge)
        with pytest.raises(UserError, match="storage 0 has 4000 bytes, not 2130706432 numbers"):
            read_checkpoint(path)

    def test_huge_storage_in_a_stream(self, path):
        torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
        content = path.read_bytes()
        path.write_bytes(content.replace(b"M\xe8\x03Nt", b"J\x00\x00\x00\x7fNt"))
        with pytest.raises(UserError, match="claim to hold more than the file does"):
            read_checkpoint(path)

    @pytest.mark.parametrize("length", [b"\x8e" + b"\xff" * 7 + b"\x7f", b"B" + b"\xff" * 4])
    def test_huge_bytes(self, path, length):
        path.write_bytes(b"\x80\x04" + length + b"abc.")
        with pytest.raises(UserError, match="damaged"):
            read_checkpoint(path)

    def test_nested_keys(self, path):
        """Hashing a tuple 200,000 deep would bring the process down."""
        path.write_bytes(b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.")
        with pytest.raises(UserError, match="a key nests tuples"):
            read_checkpoint(path)

    def test_tensor_beyond_its_storage(self, path, rebuild_zip):
        torch.save({"a": torch.zeros(6)}, path)

        def stretch(members, home):
            name = f"{home}/data.pkl"
            size = rb"K\x06(\x85q.K\x01\x85)"  # six numbers; they become seven
            members[name], count = re.subn(size, lambda m: b"K\x07" + m[1], members[name])
            assert count == 1

        rebuild_zip(path, stretch)
        with pytest.raises(UserError, match="reaches beyond its storage"):
            read_checkpoint(path)

    @pytest.mark.parametrize(
        ("offset", "size", "stride"),
        [
            (0, (1 << 40,), (1,)),
            (0, (3,), (1 << 40,)),
            (0, (2, 3), (4, 1)),
            (1, (6,), (1,)),
            (0, (-1,), (1,)),
            (0, (2,), (-1,)),
            (-1, (2,), (1,)),
            (0, (2,), (1, 1)),
            (0, (2.0,), (1,)),
        ],
    )
    def test_improper_views(self, offset, size, stride):
        storage = Storage(torch.zeros(6))
        with pytest.raises(ValueError, match=r"beyond its storage|no proper size"):
            rebuild_tensor(storage, offset, size, stride)
        assert rebuild_tensor(storage, 1, (2, 2), (3, 1)).shape == (2, 2)
