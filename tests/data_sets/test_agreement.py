"""How far detections move between two ways of reading."""

import pytest
import torch
from detectron2.config import LazyCall
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from torch import nn

from mamba_vision import model_zoo
from mamba_vision.data import OpenCVResize, register_shapes
from mamba_vision.data.agreement import compare, evaluate_reader
from mamba_vision.errors import UserError


def found(*detections):
    """Detections from (x, y, width, height, score, class)."""
    values = torch.tensor(detections, dtype=torch.float32).reshape(-1, 6)
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.cat([values[:, :2], values[:, :2] + values[:, 2:4]], dim=1))
    instances.scores = values[:, 4]
    instances.pred_classes = values[:, 5].long()
    return instances


def test_pairs_by_hand():
    first = {
        1: found((0, 0, 10, 10, 0.9, 0), (50, 50, 20, 20, 0.8, 1), (80, 0, 10, 10, 0.2, 0)),
        2: found((0, 0, 10, 10, 0.5, 0), (1, 0, 10, 10, 0.6, 0)),
        3: found(),
        4: found((0, 0, 10, 10, 0.9, 0)),
    }
    second = {
        # The first moved by 2 and lost 0.7, the second changed class, the third is below the score.
        1: found((0, 2, 10, 10, 0.2, 0), (50, 50, 20, 20, 0.8, 2), (80, 0, 10, 10, 0.25, 0)),
        2: found((1, 0, 10, 10, 0.5, 0)),  # goes to the better score
        3: found((0, 0, 10, 10, 0.9, 0), (0, 0, 10, 10, 0.1, 0)),
        4: found(),
    }
    moved = compare(first, second, min_score=0.3)
    torch.testing.assert_close(moved.box_moves, torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(moved.score_moves, torch.tensor([0.7, 0.1]))
    assert moved.unmatched == (3, 2)


def test_nothing_to_compare():
    moved = compare({1: found()}, {1: found()}, 0.3)
    assert moved.unmatched == (0, 0)
    assert len(moved.box_moves) == len(moved.score_moves) == 0


class Brightness(nn.Module):
    """Finds one object, whose score is the mean of the pixels, and keeps their number."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, batch):
        self.sizes += [tuple(sample["image"].shape[1:]) for sample in batch]
        outputs = []
        for sample in batch:
            box = (0, 0, sample["width"], sample["height"])
            instances = found((*box, sample["image"].double().mean() / 255, 0))
            instances.pred_masks = torch.ones(1, sample["height"], sample["width"]).bool()
            outputs.append({"instances": instances})
        return outputs


@pytest.fixture
def config(tmp_path):
    register_shapes("compared", tmp_path / "set", 3)
    config = model_zoo.get_config("cascade_mask_rcnn_mamba_vision_nano_shapes")
    config.dataloader.test.dataset.names = "compared"
    config.dataloader.test.num_workers = 0
    config.dataloader.evaluator = LazyCall(COCOEvaluator)(dataset_name="compared", output_dir=None)
    yield config
    DatasetCatalog.remove("compared")
    MetadataCatalog.remove("compared")


def test_each_reader_resizes_alike(config):
    config.dataloader.test.mapper.augmentations = [
        LazyCall(OpenCVResize)(short_edge_length=64, max_size=100)
    ]
    before = str(config)
    results, findings, models = {}, {}, {}
    for reader in ("Pillow", "OpenCV"):
        models[reader] = Brightness()
        results[reader], findings[reader] = evaluate_reader(reader, config, models[reader])
    assert str(config) == before
    assert models["Pillow"].sizes == models["OpenCV"].sizes
    assert all(min(size) == 64 for size in models["OpenCV"].sizes)
    assert results["Pillow"].keys() == {"bbox", "segm"}
    moved = compare(findings["Pillow"], findings["OpenCV"], 0)
    assert len(moved.box_moves) == 3
    assert moved.box_moves.max() == 0
    assert 0 < moved.score_moves.max() < 0.01  # other filters, nearly the same mean


def test_other_augmentations_are_refused(config):
    from detectron2.data.transforms import RandomFlip

    config.dataloader.test.mapper.augmentations = [LazyCall(RandomFlip)()]
    with pytest.raises(UserError, match="other than a resize"):
        evaluate_reader("OpenCV", config, Brightness())
