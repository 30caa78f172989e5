import pytest
import torch
from detectron2.modeling.matcher import Matcher as _Matcher

from mamba_vision.matcher import Matcher


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize(
    ("thresholds", "labels"), [([0.5], [0, 1]), ([0.3, 0.7], [0, -1, 1]), ([0.4], [-1, 1])]
)
@pytest.mark.parametrize("objects", [0, 1, 5])
def test_matches_are_those_of_detectron2(objects, thresholds, labels, low_quality):
    iou = (torch.rand(objects, 300) * 20).round() / 20  # ties, and IoUs on the thresholds
    iou[:1] *= 0.2  # an object that only a low quality matches
    ours, theirs = (cls(thresholds, labels, low_quality)(iou) for cls in (Matcher, _Matcher))
    for got, expected in zip(ours, theirs, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
