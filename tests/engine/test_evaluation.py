"""Evaluation: its results, where they go, and without Detectron2's compiled part."""

import json
from typing import ClassVar

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.evaluation import DatasetEvaluator, coco_evaluation, inference_on_dataset
from pycocotools.cocoeval import COCOeval

from mamba_vision.engine import do_test, evaluation, load_config


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


class Recorder(DatasetEvaluator):
    """What it was told, in turn."""

    def __init__(self, model):
        self.model = model
        self.told = []

    def reset(self):
        self.told.append("reset")

    def process(self, inputs, outputs):
        state = self.model.training, torch.is_grad_enabled()
        self.told.append((*state, inputs, [float(output["sum"]) for output in outputs]))

    def evaluate(self):
        self.told.append("evaluate")


class Sums(torch.nn.Module):
    def forward(self, inputs):
        return [{"sum": x.sum()} for x in inputs]


def test_the_loop_is_detectron2s(monkeypatch, caplog):
    monkeypatch.setattr(evaluation, "LOG_PERIOD", 0)
    batches = [[torch.ones(2), torch.ones(3)], [torch.ones(4)]]
    model = Sums()
    ours, theirs = Recorder(model), Recorder(model)
    with caplog.at_level("INFO"):
        assert evaluation.run_evaluator(model, batches, ours) == {}
    assert inference_on_dataset(model, batches, theirs) == {}
    assert ours.told == theirs.told
    assert [told[:2] for told in ours.told[1:-1]] == [(False, False)] * 2
    assert model.training
    assert "2 of 2 batches done" in caplog.text


def test_several_evaluators_are_told_and_asked(parts, monkeypatch):
    """As a config's list."""
    monkeypatch.setattr(Keeper, "found", [])
    config, model, _ = parts
    expected = do_test(config, model)
    coco = config.dataloader.evaluator
    coco.dataset_name = str(coco.dataset_name)  # which is told by its place in the config
    config.dataloader.evaluator = [coco, LazyCall(Keeper)()]
    assert do_test(config, model)["bbox"] == pytest.approx(expected["bbox"], nan_ok=True)
    assert len(Keeper.found) == 3


@pytest.mark.cuda
def test_batches_for_a_gpu_are_pinned():
    class Pinned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, device="cuda"))

        def forward(self, inputs):
            return [{"sum": x.is_pinned()} for x in inputs]

    model = Pinned()
    loader = torch.utils.data.DataLoader(torch.ones(3, 2), batch_size=2, num_workers=1)
    evaluator = Recorder(model)
    evaluation.run_evaluator(model, loader, evaluator)
    assert [told[3] for told in evaluator.told[1:-1]] == [[1.0, 1.0], [1.0]]
    assert all(told[2].is_pinned() for told in evaluator.told[1:-1])


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
