"""Training, evaluation and pictures on data of the user's own, as a user does it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from mamba_vision import model_zoo
from mamba_vision.data import draw_shapes
from mamba_vision.engine import load_config

TOOL = Path(__file__).parents[2] / "tools" / "lazyconfig_train_net.py"
NANO = "cascade_mask_rcnn_mamba_vision_nano_shapes"
TINY = [
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "train.device=cpu",
    "train.log_period=1",
    "model.roi_heads.box_predictors.2.test_score_thresh=0.0",
]


@pytest.fixture
def data(tmp_path):
    """Annotation files ``train`` and ``val``, of two classes and without masks, and ``images``."""
    draw_shapes(tmp_path / "set", 5)
    content = json.loads((tmp_path / "set" / "annotations.json").read_text())
    content["categories"] = [{"id": 2, "name": "dog"}, {"id": 9, "name": "cat"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = 2 if annotation["category_id"] < 3 else 9
        del annotation["segmentation"]
    paths = {part: tmp_path / f"{part}.json" for part in ("train", "val")}
    for path in paths.values():
        path.write_text(json.dumps(content))
    yield paths | {"images": tmp_path / "set" / "images"}
    forget(paths)


def forget(data):
    for part in ("train", "val"):
        if str(data[part]) in DatasetCatalog:
            DatasetCatalog.remove(str(data[part]))
            MetadataCatalog.remove(str(data[part]))


@pytest.mark.slow
def test_training_in_two_processes_evaluation_and_pictures(data, tool, tmp_path):
    """As a user does it: boxes alone, from weights of a detector of other classes with masks."""
    weights = tmp_path / "weights.pth"
    torch.save({"model": model_zoo.get(NANO, device="cpu").state_dict()}, weights)
    output = tmp_path / "output"
    result = subprocess.run(
        [
            *(sys.executable, TOOL, "--config-file", NANO),
            *("--train-json", data["train"], "--train-images", data["images"]),
            *("--val-json", data["val"], "--val-images", data["images"], "--epochs", "1"),
            *("--num-gpus", "2", "--dist-url", "auto", *TINY),
            "train.max_iter=1",
            *(f"train.init_checkpoint={weights}", f"train.output_dir={output}"),
        ],
        cwd=tmp_path,
        env=os.environ
        | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
        | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    log = (output / "log.txt").read_text()
    for line in (
        "2 classes: dog, cat",
        "2 steps of 4 images: 1.6 passes over 5",
        "has no masks: the model is built without mask heads",
        "Not used, for the model has no such part (tensors): roi_heads.mask_head (",
        "(as for other classes): roi_heads.box_predictor.*.cls_score, ",
    ):
        assert log.count(line) == 1, line
    saved = load_config(output / "config.yaml")
    assert saved.train.max_iter == 1  # the last word
    assert saved.train.checkpointer.period == 2  # a pass
    assert saved.lr_multiplier.warmup_iters == 1
    results = json.loads((output / "results.json").read_text())
    assert set(results) == {"bbox"}
    assert {"AP-dog", "AP-cat"} < set(results["bbox"])
    assert results["bbox"]["AP"] is not None

    common = ["--config-file", str(output / "config.yaml")]
    evaluation = tmp_path / "evaluation"
    final = output / "model_final.pth"
    assert (
        tool("lazyconfig_train_net")(
            [
                *common,
                "--eval-only",
                f"train.init_checkpoint={final}",
                f"train.output_dir={evaluation}",
            ]
        )
        == 0
    )
    assert json.loads((evaluation / "results.json").read_text()) == results

    # elsewhere, without the data, the names are known
    forget(data)
    data["train"].unlink()
    data["val"].unlink()
    pictures = [
        "--output",
        str(tmp_path / "pictures"),
        "--input",
        str(data["images"] / "000001.jpg"),
    ]
    assert tool("demo")([*common, "--weights", str(final), *pictures]) == 0
    assert (tmp_path / "pictures" / "000001.png").is_file()
    assert MetadataCatalog.get(str(data["val"])).thing_classes == ["dog", "cat"]
