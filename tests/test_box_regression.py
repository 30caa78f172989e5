"""Boxes to deltas and back: against the definition in float64, and Detectron2's own."""

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform as _Box2BoxTransform

from mamba_vision.box_regression import Box2BoxTransform

WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (1 / 0.033,) * 2 + (1 / 0.067,) * 2]


def _boxes(count=200):
    corners = 800 * torch.rand(count, 2)
    return torch.cat([corners, corners + 1 + 300 * torch.rand(count, 2)], dim=1)


def _center_form(boxes):
    """Centers and sides of x and y, each (R,), float64."""
    x0, y0, x1, y1 = boxes.double().unbind(dim=1)
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0


@pytest.mark.parametrize("weights", WEIGHTS)
def test_definition(weights):
    """Of R-CNN (arXiv:1311.2524, appendix C)."""
    sources, targets = _boxes(), _boxes()
    (px, py, pw, ph), (gx, gy, gw, gh) = map(_center_form, (sources, targets))
    expected = [(gx - px) / pw, (gy - py) / ph, (gw / pw).log(), (gh / ph).log()]
    expected = torch.stack([w * x for w, x in zip(weights, expected)], dim=1)
    transform = Box2BoxTransform(weights=weights)
    deltas = transform.get_deltas(sources, targets)
    torch.testing.assert_close(deltas.double(), expected, rtol=1e-4, atol=1e-4)
    moved = transform.apply_deltas(deltas, sources)
    torch.testing.assert_close(moved, targets, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weights", [*WEIGHTS, (10.0, 9.0, 5.0, 4.0)])
def test_is_the_transform_of_detectron2(weights, dtype, classes):
    boxes, results = _boxes(), []
    deltas = (5 * torch.randn(200, 4 * classes)).to(dtype)  # some sides are clamped
    deltas[0, 0], deltas[1, 2] = torch.nan, torch.inf
    for cls in (Box2BoxTransform, _Box2BoxTransform):
        transform = cls(weights=weights)
        inputs = deltas.clone().requires_grad_()
        moved = transform.apply_deltas(inputs, boxes)
        (gradient,) = torch.autograd.grad(moved[2:].sum(), inputs)
        results.append([transform.get_deltas(boxes, boxes.flip(0)), moved, gradient])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, equal_nan=True)
    for got, expected in zip(results[0][:2], results[1]):
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())


def test_there_may_be_no_box():
    none = torch.zeros(0, 4)
    transform = Box2BoxTransform(weights=WEIGHTS[0])
    assert transform.get_deltas(none, none).shape == (0, 4)
    assert transform.apply_deltas(none, none).shape == (0, 4)


@pytest.mark.cuda
def test_does_not_wait_for_the_gpu():
    boxes = _boxes().cuda()
    transform = Box2BoxTransform(weights=WEIGHTS[1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        deltas = transform.get_deltas(boxes, boxes.flip(0))
        moved = transform.apply_deltas(deltas, boxes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(moved, boxes.flip(0), rtol=1e-5, atol=1e-3)
