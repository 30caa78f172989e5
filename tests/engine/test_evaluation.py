"""Evaluation: its results, where they go, and without Detectron2's compiled part."""

import json

import pytest
from detectron2.config import instantiate
from detectron2.evaluation import coco_evaluation
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
