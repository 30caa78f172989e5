"""Every leaf under Detectron2's own, unmodified tools/lazyconfig_train_net.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_vision import model_zoo

SMALL = [
    "model.backbone.bottom_up.dim=16",
    "model.backbone.bottom_up.in_dim=8",
    "model.backbone.bottom_up.depths=[1,1,2,2]",
    "model.backbone.bottom_up.window_size=[8,8,8,4]",
    "model.backbone.out_channels=16",
    *(f"model.roi_heads.box_heads.{k}.fc_dims=[32]" for k in range(3)),
    "model.roi_heads.box_predictors.2.test_score_thresh=0.0",
    "dataloader.train.mapper.augmentations.1.tfm_or_aug.augs.0.short_edge_length=[64]",
    "dataloader.train.mapper.augmentations.1.tfm_or_aug.augs.1.crop_size=[48,64]",
    "dataloader.train.mapper.augmentations.2.short_edge_length=[64,96]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=96",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "train.device=cpu",
    "train.amp.enabled=False",
    "train.max_iter=3",
    "train.eval_period=0",
    "train.log_period=1",
]


# Runs the tool's file as a script, once for each list of arguments: imports are paid for once.
DRIVER = """
import json, runpy, sys
tool, commands = sys.argv[1:]
for arguments in json.loads(commands):
    print("arguments:", arguments, flush=True)
    sys.argv[1:] = arguments
    runpy.run_path(tool, run_name="__main__")
"""


def run(tool, datasets, *commands):
    """Run the tool with each of the lists of arguments; returns what it printed."""
    environment = os.environ | {
        "DETECTRON2_DATASETS": str(datasets),
        "PYTHONPATH": os.pathsep.join(
            [str(Path(model_zoo.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        ),
    }
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tool), json.dumps(commands)],
        env=environment,
        cwd=datasets,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def leaf(name, head="mask_rcnn"):
    return ["--config-file", str(model_zoo.CONFIGS / f"cascade_{head}_mamba_vision_{name}.py")]


def losses(folder):
    """By step, the losses that a training logged."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: {k for k in line if "loss_" in k} for line in lines}


@pytest.mark.slow
def test_coco_leaves_train_and_evaluate(stock_tool, datasets):
    commands = []
    for size in ("tiny", "small", "base"):
        common = [*leaf(f"{size}_3x_coco"), *SMALL, f"train.output_dir={datasets / size}"]
        weights = f"train.init_checkpoint={datasets / size / 'model_final.pth'}"
        commands += [common, ["--eval-only", *common, weights]]
    boxes = [*leaf("tiny_3x_coco", "rcnn"), *SMALL, f"train.output_dir={datasets / 'boxes'}"]
    commands.append([*boxes, f"train.init_checkpoint={datasets / 'tiny' / 'model_final.pth'}"])
    printed = run(stock_tool, datasets, *commands)
    stages = {f"loss_{part}_stage{k}" for part in ("cls", "box_reg", "mask") for k in range(3)}
    for size in ("tiny", "small", "base"):
        logged = losses(datasets / size)
        assert set(logged) >= {0, 1, 2}
        assert logged[2] >= stages
    logged = losses(datasets / "boxes")
    assert {x for x in logged[2] if "stage" in x} == {x for x in stages if "mask" not in x}
    results = [line for line in printed.splitlines() if line.startswith("OrderedDict")]
    assert len(results) == 3
    assert all("'bbox'" in line and "'segm'" in line for line in results)


@pytest.mark.slow
def test_the_nano_leaf_trains_on_drawn_scenes_and_evaluates(stock_tool, datasets):
    output = datasets / "nano"
    common = [
        *leaf("nano_shapes"),
        "dataloader.test.dataset.names=coco_2017_val",  # four pictures, where shapes_val has 100
        "train.device=cpu",
        "train.log_period=1",
        "train.max_iter=2",
        f"train.output_dir={output}",
    ]
    weights = f"train.init_checkpoint={output / 'model_final.pth'}"
    printed = run(stock_tool, datasets, common, ["--eval-only", *common, weights])
    assert set(losses(output)) >= {0, 1}
    assert (datasets / "shapes" / "train" / "annotations.json").is_file()
    (result,) = [line for line in printed.splitlines() if line.startswith("OrderedDict")]
    assert "'bbox'" in result
    assert "'segm'" in result
