"""Translating the released files: NVIDIA's ImageNet backbones and mmdetection's detectors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backbone import VARIANTS, MambaVision
from ..errors import UserError
from .names import CLASSIFIER, WRAPPERS, head_name

__all__ = ["Conversion", "convert", "is_released"]

_FIRST = "patch_embed.conv_down.0.weight"
_COUNTER = "num_batches_tracked"  # of a BatchNorm; some tools leave it out


@dataclass(frozen=True)
class Conversion:
    """What a released file turned out to hold.

    Attributes:
        source: ``"mmdetection detector"`` or ``"ImageNet backbone"``.
        variant: the names of :data:`~mamba_vision.backbone.VARIANTS` that have these tensors, of
            which there are several where only the windows differ; none for other sizes.
        num_classes: of the detector's heads, without the background; None for a backbone.
        weights: Detectron2's name -> tensor.
        moved: the beginning of names in ``weights`` -> how many of them there are.
        left_out: name in the file -> why it is not among the weights.
    """

    source: str
    variant: tuple[str, ...]
    num_classes: int | None
    weights: dict[str, Tensor]
    moved: Mapping[str, int]
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        """What was recognised, where the tensors went, and what was left out, line by line."""
        variant = " or ".join(self.variant) or "of sizes of its own"
        classes = "" if self.num_classes is None else f", {self.num_classes} classes"
        lines = [f"{self.source}, MambaVision {variant}{classes}"]
        lines += [f"{count:6d} tensors -> {part}*" for part, count in self.moved.items()]
        for reason in dict.fromkeys(self.left_out.values()):
            names = [name for name, why in self.left_out.items() if why == reason]
            lines.append(f"{len(names):6d} left out ({reason}): {', '.join(names)}")
        return "\n".join(lines)


def is_released(data: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's names are those of a released file, and not Detectron2's."""
    names = _unwrap(_weights(data)[0])
    return _FIRST in names or f"backbone.{_FIRST}" in names


def convert(data: Mapping[str, Any], *, prefix: str = "backbone.bottom_up.") -> Conversion:
    """Give the tensors of a released file the names that they have in Detectron2.

    Args:
        data: what :func:`~mamba_vision.checkpoint.read_checkpoint` returned.
        prefix: where the model keeps its :class:`~mamba_vision.backbone.MambaVision`; ``""`` for
            a bare backbone.

    Returns:
        The weights, and what became of everything else: every tensor of the file is in
        :attr:`Conversion.weights` or named in :attr:`Conversion.left_out`.

    Raises:
        UserError: the file holds another model, or a tensor that fits nothing; or the backbone
            lacks one.
    """
    wrapped, left_out = _weights(data)
    tensors = _unwrap(wrapped)
    detector = f"backbone.{_FIRST}" in tensors
    if any(name.startswith(f"backbone.bottom_up.{_FIRST}") for name in tensors):
        raise UserError("it is a Detectron2 checkpoint already; use it as it is")
    if not detector and _FIRST not in tensors:
        raise UserError(
            f"the file has no {_FIRST!r} of a MambaVision under any known prefix; give one of "
            "NVIDIA's ImageNet backbones or mmdetection detectors"
        )
    heads: dict[str, Tensor] = {}
    moved: Counter[str] = Counter()
    backbone: dict[str, Tensor] = {}
    strangers = []
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"the weight {name!r} is a {type(value).__name__}, not a tensor; "
                "download the file again"
            )
        if not detector and name.startswith(CLASSIFIER):
            left_out[name] = "the classifier's"
        elif detector and not name.startswith("backbone."):
            if new := head_name(name):
                heads[new] = value
                moved[re.match(r"\w+\.[a-z_]+", new)[0]] += 1  # type: ignore[index]
            else:
                strangers.append(name)
        else:
            backbone[name.removeprefix("backbone.")] = value
    arguments = _arguments(backbone)
    strangers += _check_backbone(backbone, arguments, feature_norms=detector)
    if strangers:
        raise UserError(
            f"{len(strangers)} tensors fit nothing in a MambaVision"
            f"{' Cascade Mask R-CNN' if detector else ''}: {_some(strangers)}; the file is of "
            "another model, which this project does not have"
        )
    classes = tensors.get("roi_head.bbox_head.0.fc_cls.bias")
    return Conversion(
        source="mmdetection detector" if detector else "ImageNet backbone",
        variant=_variant(arguments),
        num_classes=None if classes is None else len(classes) - 1,
        weights={f"{prefix}{name}": value for name, value in backbone.items()} | heads,
        moved={prefix: len(backbone), **moved},
        left_out=left_out,
    )


def _weights(data: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, str]]:
    """The state dict in a checkpoint, and what lies beside it."""
    for key in ("state_dict", "model"):
        if isinstance(data.get(key), dict):
            beside = {str(other): "not the weights" for other in data if other != key}
            return data[key], beside
    return data, {}


def _unwrap(wrapped: Mapping[Any, Any]) -> dict[str, Any]:
    """Take the wrappers' prefixes off the names."""
    tensors: dict[str, Any] = {}
    for key, value in wrapped.items():
        name = str(key)
        while name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        if name in tensors:
            raise UserError(f"two tensors are called {name!r} but for their prefixes; keep one")
        tensors[name] = value
    return tensors


def _arguments(backbone: Mapping[str, Tensor]) -> dict[str, Any]:
    """The constructor's arguments that show in a backbone's tensors."""
    try:
        in_dim, in_chans = backbone[_FIRST].shape[:2]
        hidden, width = backbone["levels.3.blocks.0.mlp.fc1.weight"].shape
        blocks = re.findall(r"^levels\.([0-3])\.blocks\.(\d+)\.", "\n".join(backbone), re.MULTILINE)
        return {
            "dim": backbone["patch_embed.conv_down.3.weight"].shape[0],
            "in_dim": in_dim,
            "in_chans": in_chans,
            "depths": tuple(
                1 + max(int(block) for stage, block in blocks if int(stage) == i) for i in range(4)
            ),
            # Whatever the ratio was, the constructor rounds this one down to the same widths.
            "mlp_ratio": (hidden + 0.5) / width,
            "layer_scale": 1.0 if "levels.3.blocks.0.gamma_1" in backbone else None,
            "layer_scale_conv": 1.0 if "levels.0.blocks.0.gamma" in backbone else None,
        }
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the backbone is incomplete or of another model ({error}); download the file again"
        ) from None


def _check_backbone(
    backbone: Mapping[str, Tensor], arguments: dict[str, Any], *, feature_norms: bool
) -> list[str]:
    """Compare a backbone's names and shapes with those of the model that the arguments build.

    Only a detector's has norms of its features.

    Returns:
        The tensors that the model does not have.
    """
    with torch.device("meta"):
        model = MambaVision(**arguments, num_heads=(1,) * 4, window_size=(8,) * 4)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    optional = (_COUNTER,) if feature_norms else (_COUNTER, "outnorm")
    lacking = [n for n in expected.keys() - backbone.keys() if not any(o in n for o in optional)]
    if lacking:
        raise UserError(f"the backbone lacks {_some(sorted(lacking))}; download the file again")
    return [
        name if name not in expected else f"{name} of shape {tuple(tensor.shape)}"
        for name, tensor in backbone.items()
        if expected.get(name) != tuple(tensor.shape)
    ]


def _variant(arguments: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        name
        for name, variant in VARIANTS.items()
        if all(variant[key] == arguments[key] for key in ("dim", "in_dim", "depths"))
        and (variant.get("layer_scale") is None) == (arguments["layer_scale"] is None)
        and int(arguments["mlp_ratio"]) == 4
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
