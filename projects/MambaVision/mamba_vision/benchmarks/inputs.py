"""Weights, images and targets that make a detector do what it does after training.

A network as it is initialised finds nothing, its norms change nothing and its layer scales hide
what they scale. Here everything random is drawn from a seed.

Shape legend: H x W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["add_targets", "calibrate", "draw_images", "limit_detections", "set_threshold"]

FILE_SCALE = 0.6  # of a file's sides to the resized image's: 640 x 480 to 1067 x 800
CANDIDATES = 10  # boxes above the threshold for each detection that is kept

# Mean and standard deviation of what the last layers give, by their names.
SPREADS = {
    "objectness_logits": (0.0, 1.0),
    "anchor_deltas": (0.0, 0.2),
    "cls_score": (0.0, 1.5),
    "bbox_pred": (0.0, 0.5),
    "predictor": (2.0, 2.0),  # a mask's logits: most of a box is its object
}


def draw_images(count: int, size: tuple[int, int], seed: int = 0) -> list[dict[str, Any]]:
    """Coloured clouds, as Detectron2's models take images.

    Args:
        count: of the images.
        size: H, W.
        seed: equal seeds, equal images.

    Returns:
        For each image ``image``, (3, H, W) uint8, and ``height`` and ``width`` of its file.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    coarse = torch.rand(count, 3, 2 + height // 32, 2 + width // 32, generator=generator)
    smooth = F.interpolate(coarse, size, mode="bicubic")
    noisy = smooth + 0.05 * torch.randn(smooth.shape, generator=generator)
    return [
        {
            "image": image,
            "height": max(1, round(FILE_SCALE * height)),
            "width": max(1, round(FILE_SCALE * width)),
        }
        for image in (255 * noisy.clamp(0, 1)).to(torch.uint8)
    ]


def add_targets(
    images: list[dict[str, Any]], count: int, classes: int, masks: bool, seed: int = 0
) -> None:
    """Give images ``instances``, as the training mapper does: ellipses of many sizes.

    Args:
        images: those of :func:`draw_images`.
        count: objects in each image.
        classes: K.
        masks: with ``gt_masks``, as bitmaps.
        seed: equal seeds, equal targets.
    """
    generator = torch.Generator().manual_seed(seed)
    for sample in images:
        height, width = sample["image"].shape[-2:]
        frame = torch.tensor([width, height])
        # from a sixteenth to two thirds of the short side, in any shape up to 2 : 1
        side = min(height, width) * (1 / 16) * (32 / 3) ** torch.rand(count, 1, generator=generator)
        slant = 2 ** (torch.rand(count, 1, generator=generator) - 0.5)
        sides = torch.cat([side * slant, side / slant], dim=1).minimum(frame)
        corners = (frame - sides) * torch.rand(count, 2, generator=generator)
        instances = Instances(
            (height, width), gt_boxes=Boxes(torch.cat([corners, corners + sides], 1))
        )
        instances.gt_classes = torch.randint(classes, (count,), generator=generator)
        if masks:
            x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
            (x0, y0), (w, h) = corners.T[:, :, None], sides.T[:, :, None]
            across, down = (2 * (x - x0) / w - 1) ** 2, (2 * (y - y0) / h - 1) ** 2
            instances.gt_masks = BitMasks(across[:, None, :] + down[:, :, None] <= 1)
        sample["instances"] = instances


@torch.no_grad()
def calibrate(model: nn.Module, run: Callable[[], object], seed: int = 0) -> None:
    """Draw norms and layer scales, and scale the heads' last layers, in place.

    Batch norms get about the statistics of what they see in the run, and the last layers the
    spread of ``SPREADS``.

    Args:
        model: in eval mode.
        run: calls it.
        seed: equal seeds, equal numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(x: Tensor, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(x.shape, generator=generator)).to(x)

    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] == "gamma":
            parameter.copy_(draw(parameter, 0.5, 1.5))
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (_BatchNorm, FrozenBatchNorm2d, nn.LayerNorm)):
            for x, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.2, 0.2)):
                if x is not None:
                    x.copy_(draw(x, low, high))
        if isinstance(module, (_BatchNorm, FrozenBatchNorm2d)):
            mean, variance = module.running_mean, module.running_var
            assert isinstance(mean, Tensor)
            assert isinstance(variance, Tensor)
            factors = draw(mean, -0.2, 0.2), draw(variance, 0.8, 1.25)
            handles.append(module.register_forward_pre_hook(_first(_take_statistics(*factors))))
        elif (spread := SPREADS.get(name.rsplit(".", 1)[-1])) is not None:
            handles.append(module.register_forward_hook(_first(_spread_out(*spread))))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


def _first(hook: Callable) -> Callable:
    """The hook, for the first call alone: what follows must meet the same layer."""
    called = False

    def once(*arguments: Any) -> Any:
        nonlocal called
        if called:
            return None
        called = True
        return hook(*arguments)

    return once


def _take_statistics(shift: Tensor, factor: Tensor) -> Callable:
    def hook(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0], _others(inputs[0]))
        norm.running_mean.copy_(mean + shift * variance.sqrt())
        norm.running_var.copy_(variance * factor + 1e-3)

    return hook


def _others(x: Tensor) -> list[int]:
    """All axes but that of the channels."""
    return [axis for axis in range(x.dim()) if axis != 1]


def _spread_out(wanted_mean: float, spread: float) -> Callable:
    def hook(layer: Any, _inputs: Any, y: Tensor) -> Tensor:
        mean = y.mean(_others(y))
        centred = y - mean.view(-1, *[1] * (y.dim() - 2))
        scale = spread / centred.std().clamp(min=1e-6)
        layer.weight.mul_(scale)
        layer.bias.sub_(mean).mul_(scale).add_(wanted_mean)
        return scale * centred + wanted_mean

    return hook


def limit_detections(model: nn.Module, threshold: float) -> None:
    """Set the least score of a detection."""
    for module in model.modules():
        if isinstance(module, FastRCNNOutputLayers):
            module.test_score_thresh = threshold


@torch.no_grad()
def set_threshold(model: nn.Module, run: Callable[[], object]) -> float:
    """Set the least score so that as many boxes pass it as in images with many objects.

    Args:
        model: in eval mode.
        run: calls it on one image.

    Returns:
        The score, in [0, 1]; 0 for a model without Detectron2's ``FastRCNNOutputLayers``.
    """
    limit_detections(model, 0.0)
    predictors = [m for m in model.modules() if isinstance(m, FastRCNNOutputLayers)]
    if not predictors:
        return 0.0
    with _spied(predictors[-1], "inference") as seen:
        run()
    logits = torch.cat([predictions[0] for predictions, _ in seen])
    foreground = logits.softmax(dim=1)[:, :-1].flatten()
    count = min(len(foreground), CANDIDATES * predictors[-1].test_topk_per_image)
    threshold = foreground.topk(count).values[-1].item()
    limit_detections(model, threshold)
    return threshold


@contextmanager
def _spied(module: nn.Module, method: str) -> Iterator[list[Any]]:
    """What a method of one module is given while this is open."""
    seen = []
    original = getattr(module, method)

    def spy(*arguments: Any) -> Any:
        seen.append(arguments)
        return original(*arguments)

    setattr(module, method, spy)
    try:
        yield seen
    finally:
        delattr(module, method)
