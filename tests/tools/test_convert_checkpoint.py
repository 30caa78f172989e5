import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate

from mamba_vision import model_zoo

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/convert_checkpoint.py"
RELEASED = ROOT / "tests/data/reference_detector/checkpoint.pth"


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """Call the tool in an empty directory; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(TOOL))["main"]
    return lambda *arguments: main([str(argument) for argument in arguments])


def test_converted_file_works_with_detectron2(tmp_path):
    done = subprocess.run(
        [sys.executable, TOOL, RELEASED, "converted.pth"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "projects/MambaVision")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith("mmdetection detector, MambaVision of sizes of its own, 5 classes")
    assert "   126 tensors -> backbone.bottom_up.*" in lines
    assert "     1 left out (not the weights): meta" in lines
    assert lines[-1] == "-> converted.pth"
    assert [p.name for p in tmp_path.iterdir()] == ["converted.pth"]

    model = model_zoo.get_config("cascade_mask_rcnn_mamba_vision_tiny_3x_coco").model
    model.backbone.bottom_up.update(dim=16, in_dim=16, depths=(1, 1, 3, 2))
    model.backbone.out_channels = 16
    model.roi_heads.num_classes = 5
    for head in model.roi_heads.box_heads:
        head.fc_dims = [32]
    model = instantiate(model)
    DetectionCheckpointer(model).load(str(tmp_path / "converted.pth"))
    source = torch.load(RELEASED, weights_only=True)["state_dict"]
    loaded = model.state_dict()
    assert len(loaded) == len(source)
    for name in ("patch_embed.conv_down.0.weight", "outnorm3.bias"):
        assert torch.equal(loaded[f"backbone.bottom_up.{name}"], source[f"backbone.{name}"])
    assert torch.equal(
        loaded["roi_heads.mask_head.2.predictor.weight"],
        source["roi_head.mask_head.2.conv_logits.weight"],
    )


def test_nothing_is_written_over(convert, tmp_path, capsys):
    (tmp_path / "there.pth").write_text("mine")
    assert convert(RELEASED, "there.pth") == 2
    assert capsys.readouterr().err == (
        "error: there.pth: exists already; choose another name, or give --force\n"
    )
    assert (tmp_path / "there.pth").read_text() == "mine"
    assert convert(RELEASED, "there.pth", "--force") == 0
    assert "model" in torch.load(tmp_path / "there.pth", weights_only=True)


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("page.pth", "out.pth", "page.pth: not a file of weights: it is a web page"),
        ("none.pth", "out.pth", "none.pth: there is no such file"),
        (RELEASED, "out.pkl", "out.pkl: Detectron2 knows a checkpoint by its ending"),
        (RELEASED, "none/out.pth", "none/out.pth: cannot be written"),
    ],
)
def test_bad_input_ends_in_one_line(convert, tmp_path, capsys, source, target, reason):
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    assert convert(source, target) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {reason}")
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["page.pth"]
