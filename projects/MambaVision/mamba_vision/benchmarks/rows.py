"""The optimisations, and the rows of a comparison, each with one more of them switched on.

The first row, ``plain``, has all of them off: plain layers of torch and Detectron2's own parts,
with the operators of mamba-ssm and causal-conv1d where these are installed; on a CPU, where these
do not run, with the scan that steps from token to token.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from detectron2.config import instantiate
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.attention import SDPBackend

from ..engine.overrides import apply_overrides
from ..errors import UserError
from ..ops.benchmark_operators import OPERATORS, Shape

__all__ = ["SWITCHES", "Row", "Switch", "build", "check_names", "make_rows", "usable_switches"]

BOTTOM_UP = "model.backbone.bottom_up"
RPN = "model.proposal_generator"
ROI_HEADS = "model.roi_heads"
POOLERS = ("detectron2.modeling.poolers.ROIPooler", "mamba_vision.roi_heads.ROIPooler")
RPNS = ("detectron2.modeling.proposal_generator.RPN", "mamba_vision.proposal_generator.RPN")
ANCHORS = (
    "detectron2.modeling.anchor_generator.DefaultAnchorGenerator",
    "mamba_vision.proposal_generator.AnchorGenerator",
)
MATCHERS = ("detectron2.modeling.matcher.Matcher", "mamba_vision.matcher.Matcher")
TRANSFORMS = (
    "detectron2.modeling.box_regression.Box2BoxTransform",
    "mamba_vision.box_regression.Box2BoxTransform",
)
PREDICTORS = (
    "detectron2.modeling.roi_heads.FastRCNNOutputLayers",
    "mamba_vision.roi_heads.ClassSpecificOutputLayers",
)
MASK_HEADS = (
    "detectron2.modeling.roi_heads.MaskRCNNConvUpsampleHead",
    "mamba_vision.roi_heads.MaskHead",
)
EVALUATORS = ("detectron2.evaluation.COCOEvaluator", "mamba_vision.engine.COCOEvaluator")


@dataclass(frozen=True)
class Switch:
    """An optimisation.

    Args:
        name: in the tables.
        config: its config keys, each with the value for off and the one for on.
        prepare: its argument of :func:`mamba_vision.inference.prepare`, for evaluation.
        gpu: it does nothing on a CPU.
        half: it does nothing in float32.
        training: evaluation does not have it.
        loop: the evaluation loop alone has it.
    """

    name: str
    config: tuple[tuple[str, str, str], ...] = ()
    prepare: str | None = None
    gpu: bool = False
    half: bool = False
    training: bool = False
    loop: bool = False

    @property
    def of_evaluation(self) -> bool:
        """Whether a model in evaluation has it."""
        return not self.training and not self.loop

    @property
    def of_training(self) -> bool:
        """Whether a training has it."""
        return bool(self.config) and not self.loop

    @property
    def of_backbone(self) -> bool:
        """Whether the backbone alone has it."""
        own = any(key.startswith(BOTTOM_UP) for key, _, _ in self.config)
        return own or (not self.config and self.prepare is not None)


SWITCHES = (
    Switch(
        "operators",
        (
            (f"{BOTTOM_UP}.scan_backend", "mamba_ssm", "null"),
            (f"{BOTTOM_UP}.conv_backend", "causal_conv1d", "null"),
        ),
    ),
    Switch(  # off: the kernel that PyTorch chooses by itself
        "attention", ((f"{BOTTOM_UP}.attention_backend", "pytorch", "null"),), gpu=True, half=True
    ),
    Switch("fused_norm", ((f"{BOTTOM_UP}.fused_norm", "false", "true"),), gpu=True),
    Switch(
        "fused_linear", ((f"{BOTTOM_UP}.fused_linear", "false", "true"),), gpu=True, training=True
    ),
    Switch("skip_padding", ((f"{BOTTOM_UP}.skip_padding", "false", "true"),)),
    Switch(
        "pooler", tuple((f"{ROI_HEADS}.{x}_pooler._target_", *POOLERS) for x in ("box", "mask"))
    ),
    Switch(
        "rpn",
        ((f"{RPN}._target_", *RPNS), (f"{RPN}.anchor_generator._target_", *ANCHORS)),
    ),
    Switch(
        "matcher",
        (
            (f"{RPN}.anchor_matcher._target_", *MATCHERS),
            *((f"{ROI_HEADS}.proposal_matchers.{k}._target_", *MATCHERS) for k in range(3)),
        ),
        training=True,
    ),
    Switch(
        "box_transform",
        (
            (f"{RPN}.box2box_transform._target_", *TRANSFORMS),
            *(
                (f"{ROI_HEADS}.box_predictors.{k}.box2box_transform._target_", *TRANSFORMS)
                for k in range(3)
            ),
        ),
    ),
    Switch(
        "predictors",
        tuple((f"{ROI_HEADS}.box_predictors.{k}._target_", *PREDICTORS) for k in range(3)),
    ),
    Switch(
        "mask_loss",
        tuple((f"{ROI_HEADS}.mask_heads.{k}._target_", *MASK_HEADS) for k in range(3)),
        training=True,
    ),
    Switch("fused_adamw", (("optimizer.fused", "false", "true"),), training=True),
    Switch("cast_once", prepare="dtype", half=True),  # first: a prepared model casts at every call
    Switch("fuse", prepare="fuse"),
    Switch(  # in training of the backbone's windowed stages and the RoI heads alone
        "cuda_graphs",
        tuple((f"{part}.cuda_graphs", "false", "true") for part in (BOTTOM_UP, ROI_HEADS)),
        prepare="cuda_graphs",
        gpu=True,
    ),
    Switch("evaluator", (("dataloader.evaluator._target_", *EVALUATORS),), loop=True),
)

# What takes the place of the operators that others are measured by where it is not installed.
_OPERATORS = {"mamba_ssm": "selective_scan", "causal_conv1d": "depthwise_conv1d_silu"}


@dataclass(frozen=True)
class Row:
    """A detector of the comparison.

    Args:
        name: what is on.
        padding: ``window_padding``.
        config: with this row's switches.
        float32: the same for float32, in which that which does nothing there may not run.
        prepare: the arguments of ``prepare`` that are on; without any nothing is prepared.
    """

    name: str
    padding: str
    config: DictConfig
    float32: DictConfig
    prepare: frozenset[str] = frozenset()

    @property
    def cells(self) -> tuple[str, str]:
        """What a table says of the row first."""
        return self.name, self.padding

    def model(self, dtype: torch.dtype) -> DictConfig:
        """The detector's config, to be run under autocast with ``dtype``."""
        return (self.float32 if dtype is torch.float32 else self.config).model


def usable_switches(
    config: DictConfig, device: str, dtype: torch.dtype
) -> tuple[list[Switch], list[str]]:
    """The switches that change something here, and a word on each of the others.

    Raises:
        UserError: the config's detector is not built upon a MambaVision.
    """
    if OmegaConf.select(config, f"{BOTTOM_UP}.dim") is None:
        raise UserError(f"{BOTTOM_UP} is not a MambaVision; give the config of a detector with one")
    usable, words = [], []
    for switch in SWITCHES:
        present = tuple(
            (key, _off(off, config, device, dtype), on)
            for key, off, on in switch.config
            if _has(config, key, off, on)
        )
        if reason := _obstacle(switch, present, device, dtype):
            words.append(f"without {switch.name}: {reason}")
        else:
            usable.append(replace(switch, config=present))
    return usable, words


def _has(config: DictConfig, key: str, off: str, on: str) -> bool:
    """Whether the config has the part that a key is of, and nothing else in the place of it."""
    node, _, name = key.rpartition(".")
    part = OmegaConf.select(config, node)
    if part is None:
        return False
    target = part.get("_target_")
    target = locate(target) if isinstance(target, str) else target
    if name != "_target_":
        return name in inspect.signature(target).parameters
    return target in (locate(off), locate(on))


def _off(value: str, config: DictConfig, device: str, dtype: torch.dtype) -> str:
    """What a switch's value for off means here."""
    if value in _OPERATORS:
        if device == "cpu":
            return "reference" if value == "mamba_ssm" else "torch"
        operator = OPERATORS[_OPERATORS[value]]
        tensors = [x.to(device) for x in operator.draw(Shape(1, 1, 8, 1), torch.float32)]
        return "torch" if operator.obstacle(value, tensors) else value
    if device == "cuda" and value == "pytorch":
        bottom_up = config.model.backbone.bottom_up
        width = 4 * bottom_up.dim // bottom_up.num_heads[2]
        q = torch.zeros(1, 1, 64, -(-width // 8) * 8, device=device, dtype=dtype)
        chosen = SDPBackend(torch._fused_sdp_choice(q, q, q))
        return chosen.name.removesuffix("_ATTENTION").lower()
    return value


def _obstacle(
    switch: Switch, present: Sequence[tuple[str, str, str]], device: str, dtype: torch.dtype
) -> str | None:
    """Why a switch, of which these keys are there, changes nothing; None if it does."""
    if switch.gpu and device == "cpu":
        return "it does nothing on a CPU"
    if switch.half and dtype is torch.float32:
        return "it does nothing in float32"
    if not present and not switch.prepare:
        return "the config has no such part"
    return None


def check_names(only: Iterable[str]) -> None:
    """Check the names of rows given by ``--only``.

    Raises:
        UserError: one is none of a row.
    """
    names = ["plain", *(switch.name for switch in SWITCHES), "all"]
    for name in only:
        if name not in names:
            raise UserError(f"--only: {name!r} is none of the rows {', '.join(names)}")


def make_rows(
    config: DictConfig, switches: Sequence[Switch], paddings: Iterable[str], only: Sequence[str]
) -> list[Row]:
    """For each padding all switches off, then one more of them on in each row.

    Args:
        config: is not changed.
        switches: in the order in which they are switched on.
        paddings: of ``window_padding``.
        only: ``plain``, ``all`` and names of switches whose rows to keep; all without any.
    """
    rows = []
    for padding in paddings:
        for count in range(len(switches) + 1):
            names = [switches[count - 1].name if count else "plain"]
            label = f"+ {names[0]}" if count else "plain"
            if count and count == len(switches):
                names.append("all")
                label = f"all ({label})"
            if only and not set(names) & set(only):
                continue
            changed, float32 = copy.deepcopy(config), copy.deepcopy(config)
            for one in changed, float32:
                one.model.backbone.bottom_up.window_padding = padding
            for k, switch in enumerate(switches):
                for key, off, on in switch.config:
                    apply_overrides(changed, [f"{key}={on if k < count else off}"])
                    is_on = k < count or switch.half
                    apply_overrides(float32, [f"{key}={on if is_on else off}"])
            prepared = frozenset(s.prepare for s in switches[:count] if s.prepare)
            rows.append(Row(label, padding, changed, float32, prepared))
    return rows


def build(config: DictConfig, state: dict[str, torch.Tensor], device: str) -> nn.Module:
    """A model of a config's in eval mode, which shares the weights ``state``."""
    model = instantiate(config).to(device).eval()
    model.load_state_dict(state, assign=True)
    return model
