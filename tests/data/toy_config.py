"""A config that trains in milliseconds, on pictures that it draws beside itself when it is loaded.

Every picture holds one white square, in one place. The toy model knows the place: its box AP and
its mask AP are 100, less if its boxes jitter. It learns a single colour.
"""

import json
from pathlib import Path

import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from detectron2.structures import Boxes, Instances
from fvcore.common.param_scheduler import CosineParamScheduler
from PIL import Image, ImageDraw
from torch import nn

from mamba_vision.data import build_train_loader


class Toy(nn.Module):
    def __init__(
        self,
        channels: int = 4,
        scale: float = 1.0,
        mean: tuple = (0.0, 0.0, 0.0),
        jitter: float = 0.0,
    ):
        super().__init__()
        self.jitter = jitter
        self.conv = nn.Conv2d(3, channels, 3)
        self.norm = nn.SyncBatchNorm(channels)
        self.scale = scale

    def forward(self, inputs):
        device = self.conv.weight.device
        inputs = sorted(inputs, key=lambda x: x["file_name"])  # no order may change a rounding
        images = torch.stack([x["image"].to(device).float() / 255 for x in inputs])
        values = self.norm(self.conv(images)).relu().mean((1, 2, 3))
        if self.training:
            return {"loss_toy": self.scale * (values - 1).square().mean()}
        outputs = []
        for x in inputs:
            instances = Instances((x["height"], x["width"]))
            boxes = torch.tensor([[16.0, 16.0, 48.0, 48.0]]) + self.jitter * x.get("image_id", 0)
            instances.pred_boxes = Boxes(boxes)
            instances.scores = torch.tensor([0.75])
            instances.pred_classes = torch.tensor([1])
            instances.pred_masks = torch.zeros(1, x["height"], x["width"], dtype=torch.bool)
            instances.pred_masks[:, 16:48, 16:48] = True
            outputs.append({"instances": instances})
        return outputs


def draw(folder, count):
    if folder.exists():
        return
    folder.mkdir()
    for i in range(count):
        image = Image.new("RGB", (64, 64), (40 * i, 60, 90))
        ImageDraw.Draw(image).rectangle((16, 16, 47, 47), fill="white")
        image.save(folder / f"{i}.png")
    annotation = {"category_id": 2, "bbox": [16, 16, 32, 32], "area": 1024, "iscrowd": 0}
    annotation["segmentation"] = [[16, 16, 48, 16, 48, 48, 16, 48]]
    content = {
        "info": {},
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(count)
        ],
        "annotations": [{"id": i + 1, "image_id": i, **annotation} for i in range(count)],
        "categories": [{"id": 1, "name": "circle"}, {"id": 2, "name": "square"}],
    }
    (folder / "annotations.json").write_text(json.dumps(content))


def data_set(name, count):
    folder = Path(__file__).parent / name
    draw(folder, count)
    if str(folder) not in DatasetCatalog:
        register_coco_instances(str(folder), {}, str(folder / "annotations.json"), str(folder))
    return str(folder)


model = L(Toy)(channels=4)

dataloader = {
    "train": L(build_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names=data_set("train_images", 5)),
        mapper=L(DatasetMapper)(is_train=True, augmentations=[], image_format="RGB"),
        total_batch_size=2,
        num_workers=0,
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(
            names=data_set("test_images", 3), filter_empty=False
        ),
        mapper=L(DatasetMapper)(is_train=False, augmentations=[], image_format="RGB"),
        num_workers=0,
    ),
    "evaluator": L(COCOEvaluator)(dataset_name="${..test.dataset.names}"),
}

optimizer = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(), lr=0.1, momentum=0.9, weight_decay=1e-4
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.1),
    warmup_factor=0.1,
    warmup_length=0.5,
)

train = {
    "output_dir": str(Path(__file__).parent / "output"),
    "init_checkpoint": "",
    "max_iter": 6,
    "amp": {"enabled": True},
    "ddp": {"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": False},
    "checkpointer": {"period": 3, "max_to_keep": 2},
    "eval_period": 0,
    "log_period": 1,
    "device": "cuda",
    "seed": 1,
}
