import pytest
import torch
from detectron2.modeling.matcher import Matcher as _Matcher

from mamba_vision.matcher import Matcher

BOTH = Matcher, _Matcher


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize(
    ("thresholds", "labels"), [([0.5], [0, 1]), ([0.3, 0.7], [0, -1, 1]), ([0.4], [-1, 1])]
)
@pytest.mark.parametrize("objects", [0, 1, 5])
def test_matches_are_those_of_detectron2(objects, thresholds, labels, low_quality):
    iou = (torch.rand(objects, 300) * 20).round() / 20  # ties, and IoUs on the thresholds
    iou[:1] *= 0.2  # an object that only a low quality matches
    ours, theirs = (cls(thresholds, labels, low_quality)(iou) for cls in BOTH)
    for got, expected in zip(ours, theirs, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("counts", [(3, 1), (0, 4, 0, 2), (0, 0), (5,), ()])
def test_many_images_at_once_are_each_matched_as_by_detectron2(counts, low_quality):
    iou = (torch.rand(sum(counts), 300) * 20).round() / 20
    iou[:1] *= 0.2
    iou[-1:] = 0  # an object far from all boxes
    settings = [0.3, 0.7], [0, -1, 1], low_quality
    matches, labels = Matcher(*settings).match_images(iou, counts)
    assert matches.shape == labels.shape == (len(counts), 300)
    for *ours, iou_i in zip(matches, labels, iou.split(counts), strict=True):
        for got, expected in zip(ours, _Matcher(*settings)(iou_i), strict=True):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)


def test_there_may_be_no_box():
    for got, expected in zip(*(cls([0.5], [0, 1], True)(torch.rand(3, 0)) for cls in BOTH)):
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape == (0,)
