"""Evaluation: its results, where they go, and without Detectron2's compiled part."""

import json
from typing import ClassVar

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.evaluation import DatasetEvaluator, coco_evaluation
from pycocotools.cocoeval import COCOeval

from mamba_vision.engine import do_test, load_config


@pytest.fixture
def parts(toy):
    config = load_config(toy)
    return config, instantiate(config.model), toy.parent / "output" / "results.json"


def test_results_are_returned_and_written(parts):
    config, model, path = parts
    results = do_test(config, model)
    assert model.training  # as it was
    assert results["bbox"]["AP"] == results["segm"]["AP"] == pytest.approx(100)
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert written["bbox"]["APl"] is None
    assert written["bbox"]["AP"] == results["bbox"]["AP"]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_without_the_compiled_part_the_official_one_gives_the_same(parts, monkeypatch, caplog):
    config, model, _ = parts
    expected = do_test(config, model)
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", COCOeval)  # as its import leaves it
    with caplog.at_level("INFO"):
        results = do_test(config, model)
    assert "Falling back to official COCO eval" in caplog.text
    for task in ("bbox", "segm"):
        assert results[task] == pytest.approx(expected[task], nan_ok=True)


def test_without_an_evaluator_nothing_is_done(parts):
    config, model, path = parts
    config.dataloader.evaluator = None
    assert do_test(config, model) == {}
    assert not path.exists()


class Keeper(DatasetEvaluator):
    found: ClassVar[list] = []

    def process(self, inputs, outputs):
        self.found += [output["instances"].to("cpu") for output in outputs]

    def evaluate(self):
        return {}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_the_prepared_copy_finds_what_the_model_finds(toy, monkeypatch, device):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(Keeper, "found", [])
    config = load_config(toy)
    config.model = load_config("cascade_mask_rcnn_mamba_vision_nano_shapes").model
    config.dataloader.evaluator = LazyCall(Keeper)()
    for predictor in config.model.roi_heads.box_predictors:
        predictor.test_score_thresh = 0.0
    model = instantiate(config.model).to(device)
    for switch in (False, True):
        config.train.update(fuse_eval=switch, cuda_graphs=switch)
        assert do_test(config, model) == {}
    assert model.training
    assert len(Keeper.found) == 2 * 3
    for plain, prepared in zip(Keeper.found[:3], Keeper.found[3:]):
        assert len(prepared) == len(plain) == 100
        torch.testing.assert_close(prepared.scores, plain.scores, rtol=0, atol=1e-3)
        distance = prepared.pred_boxes.tensor - plain.pred_boxes.tensor
        assert (distance.abs().amax(dim=1) < 0.5).sum() > 70  # near ties may change places
