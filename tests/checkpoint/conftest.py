"""Writing files of weights in the formats that there are, and detectors to load them into."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate

from mamba_vision import MambaVision, model_zoo

SMALL = {"dim": 16, "in_dim": 16, "depths": (1, 1, 3, 2), "num_heads": (2, 4, 8, 16)}
SMALL |= {"window_size": (8, 8, 7, 5)}


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


@pytest.fixture(scope="session")
def released():
    """A detector's file as mmdetection writes it: the small one with five classes."""
    return Path(__file__).parents[1] / "data/reference_detector/checkpoint.pth"


@pytest.fixture
def backbone():
    """Build the small detector's backbone, or one that differs from it."""
    return lambda **changes: MambaVision(**SMALL | changes)


@pytest.fixture
def detector():
    """Build the model that the small detector's weights fit, or one that differs from it."""

    def build(num_classes=5, config="cascade_mask_rcnn_mamba_vision_tiny_3x_coco", **changes):
        model = model_zoo.get_config(config).model
        model.backbone.bottom_up.update(SMALL | changes)
        model.backbone.out_channels = 16
        model.roi_heads.num_classes = num_classes
        for head in model.roi_heads.box_heads:
            head.fc_dims = [32]
        return instantiate(model)

    return build


@pytest.fixture
def imagenet(backbone):
    """The state dict of an ImageNet classifier with that backbone, as NVIDIA's files hold it."""

    def build(prefix="", **changes):
        state = backbone(**changes).state_dict()
        tensors = {name: torch.rand_like(value.float()) for name, value in state.items()}
        tensors = {name: value for name, value in tensors.items() if "outnorm" not in name}
        for name in ("norm.weight", "norm.bias", "norm.running_mean", "head.bias"):
            tensors[name] = torch.rand(128)
        tensors["head.weight"] = torch.rand(1000, 128)
        return {f"{prefix}{name}": value for name, value in tensors.items()}

    return build
