"""Writing files of weights in the formats that there are, and detectors to load them into."""

import pickle
import zipfile

import pytest
import torch


def save_zip(data, path, protocol=2):
    torch.save(data, path, pickle_protocol=protocol)


def save_stream(data, path, protocol=2):
    torch.save(data, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)


def save_pickle(data, path, protocol=2):
    path.write_bytes(pickle.dumps(data, protocol))


@pytest.fixture(params=[save_zip, save_stream, save_pickle])
def save(request):
    """Write data without tensors, in each of the formats."""
    return request.param


@pytest.fixture(params=[save_zip, save_stream])
def save_tensors(request):
    """Write data with tensors, in each of the formats that can."""
    return request.param


@pytest.fixture
def path(tmp_path):
    """Where a test's file of weights goes."""
    return tmp_path / "weights.pth"


def _rebuild_zip(path, change):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    home = next(iter(members)).partition("/")[0]
    change(members, home)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture
def rebuild_zip():
    """Write an archive anew, with the contents of its members changed by a function."""
    return _rebuild_zip
