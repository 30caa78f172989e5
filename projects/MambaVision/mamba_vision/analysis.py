"""Parameters and multiply-adds of a detector, part by part.

fvcore counts what the parts do for one image at inference, as they run on the CPU. Backbone, neck
and RPN see the whole image; the heads see a given number of RoIs, on which alone they depend.
Padding is counted like any other token, also where the model would skip it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.export import TracingAdapter
from detectron2.structures import Instances
from detectron2.utils.registry import locate
from fvcore.nn import FlopCountAnalysis, parameter_count
from fvcore.nn.jit_handles import get_shape
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .backbone import MambaVision
from .backbone.mixer import MambaVisionMixer
from .errors import UserError

__all__ = ["MULTIPLY_ADDS", "analyze"]

MULTIPLY_ADDS = ("layers", "attention", "scan")

# What fvcore has no handle for, as a trace names it; the last two are the backends "torch".
_ATTENTION = "scaled_dot_product_attention"
_CONV, _SCAN = "PythonOp._ShiftedSum", "PythonOp._ChunkedScan"

_MODULES = {
    "backbone": ("backbone.bottom_up",),
    "FPN": ("backbone",),
    "RPN": ("proposal_generator",),
    "box heads": ("roi_heads.box_head", "roi_heads.box_predictor"),
    "mask heads": ("roi_heads.mask_head",),
}


def analyze(
    model: DictConfig, size: tuple[int, int] = (800, 1280), rois: int = 1000, masks: int = 100
) -> dict[str, Counter[str]]:
    """Count what a detector takes for one image.

    Args:
        model: the ``model`` of a config: a GeneralizedRCNN whose backbone is an FPN over a
            MambaVision. It is not changed.
        size: height and width of the image in pixels, multiples of 32.
        rois: proposals that go through each box head.
        masks: detections that go through each mask head.

    Returns:
        For each part, ``backbone``, ``FPN``, ``RPN``, ``box heads`` and, where the detector has
        them, ``mask heads``:

        * ``parameters``, all of them;
        * ``layers``: multiply-adds of convolutions, linear layers, norms and upsampling, as fvcore
          counts them, but for those under ``scan``;
        * ``attention``: multiply-adds of queries by keys and of weights by values;
        * ``scan``: multiply-adds of the Mamba mixers between their first and last projection: the
          depthwise convolutions, the projections to delta, B and C, and the selective scan.

    Raises:
        UserError: the model is of another kind, or the backbone does not take the size.
    """
    model = copy.deepcopy(model)
    _check_kind(model)
    model.backbone.bottom_up.update(scan_backend="torch", conv_backend="torch", skip_padding=False)
    detector = instantiate(model).eval()
    backbone, rpn, roi_heads = detector.backbone, detector.proposal_generator, detector.roi_heads
    shapes = [backbone.output_shape()[name] for name in rpn.in_features]

    whole = _Trace(backbone, torch.zeros(1, backbone.bottom_up.in_chans, *size))
    bottom_up = whole.multiply_adds("model.bottom_up")
    maps = [
        torch.zeros(1, shape.channels, *(-(-side // shape.stride) for side in size))
        for shape in shapes
    ]

    def of_rois(count: int, pooler: Any, head: nn.Module, *more: Any) -> Counter[str]:
        # One RoI is traced: all cost the same.
        x = torch.zeros(1, shapes[0].channels, *pooler.output_size)
        one = _Trace(head, x, *more).multiply_adds()
        return Counter({kind: count * number for kind, number in one.items()})

    box_heads: Counter[str] = Counter()
    for stage in zip(_stages(roi_heads.box_head), _stages(roi_heads.box_predictor)):
        box_heads += of_rois(rois, roi_heads.box_pooler, nn.Sequential(*stage))
    costs = {
        "backbone": bottom_up,
        "FPN": whole.multiply_adds() - bottom_up,
        "RPN": _Trace(rpn.rpn_head, maps).multiply_adds(),
        "box heads": box_heads,
    }
    if roi_heads.mask_on:
        detection = Instances((1, 1), pred_classes=torch.zeros(1, dtype=torch.int64))
        costs["mask heads"] = of_rois(
            masks, roi_heads.mask_pooler, roi_heads.mask_head, [detection]
        )

    parameters = parameter_count(detector)
    for part, names in _MODULES.items():
        if part in costs:
            costs[part]["parameters"] = sum(parameters[name] for name in names)
    costs["FPN"]["parameters"] -= costs["backbone"]["parameters"]
    return costs


def _check_kind(model: DictConfig) -> None:
    target = OmegaConf.select(model, "backbone.bottom_up._target_")
    if (locate(target) if isinstance(target, str) else target) is not MambaVision:
        raise UserError(
            "model.backbone.bottom_up is not a MambaVision; give the config of a detector with one"
        )
    for part in ("proposal_generator", "roi_heads"):
        if part not in model:
            raise UserError(f"model.{part} is missing; give the config of a two-stage detector")


def _stages(heads: nn.Module) -> Iterable[nn.Module]:
    return heads if isinstance(heads, nn.ModuleList) else [heads]


class _Trace:
    """What a module does on given inputs."""

    def __init__(self, module: nn.Module, *inputs: Any) -> None:
        adapter = TracingAdapter(module, inputs, allow_non_tensor=True)
        self.mixers = [n for n, m in adapter.named_modules() if isinstance(m, MambaVisionMixer)]
        self.counts = FlopCountAnalysis(adapter, adapter.flattened_inputs)
        self.counts.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        self.counts.tracer_warnings("none")
        self.counts.set_op_handle(f"aten::{_ATTENTION}", _count_attention)
        self.counts.set_op_handle(f"prim::{_CONV}", _count_conv)
        self.counts.set_op_handle(f"prim::{_SCAN}", _count_scan)

    def multiply_adds(self, part: str = "") -> Counter[str]:
        """Multiply-adds by kind, of all or of a part, whose name is ``model.`` and the module's."""
        operators = self.counts.by_operator(part)
        scan = 0
        for mixer in self.mixers:
            if mixer.startswith(part):
                inside = self.counts.by_operator(mixer)
                for projection in ("in_proj", "out_proj"):
                    inside = inside - self.counts.by_operator(f"{mixer}.{projection}")
                operators = operators - inside
                # Not all that is inside: the trace shows the steps of the scan's own code, too.
                scan += inside["linear"] + inside[_CONV] + inside[_SCAN]
        attention = operators.pop(_ATTENTION, 0)
        return Counter(layers=int(operators.total()), attention=int(attention), scan=int(scan))


def _count_attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """q (B, H, L, E), k (B, H, S, E), v (B, H, S, V): L S (E + V) for each head."""
    (batch, heads, length, channels), _, (*_, keys, values) = map(get_shape, inputs[:3])
    return batch * heads * length * keys * (channels + values)


def _count_conv(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """x (B, L, D), weight (D, W): W for each number of x."""
    (batch, length, channels), (_, width) = map(get_shape, inputs[:2])
    return batch * length * channels * width


def _count_scan(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """u, delta (B, L, D), A (D, N): for each number of u, and for each of its states, delta A,
    (delta u) B, the recurrence and C h; and once delta u and D u."""
    (batch, length, channels), _, (_, states) = map(get_shape, inputs[:3])
    return batch * length * channels * (4 * states + 2)
