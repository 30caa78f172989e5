"""Parameter groups and learning-rate schedule of the detectors' recipe, and layer-wise decay."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.solver.build import reduce_param_groups
from fvcore.common.param_scheduler import MultiStepParamScheduler, ParamScheduler
from torch import nn

from .errors import UserError

__all__ = ["WarmupMultiStep", "layer_decay", "parameter_groups"]


def parameter_groups(model: nn.Module, *, no_decay: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The trainable parameters of a model, in groups for a ``torch.optim`` optimizer.

    Detectron2's ``get_default_optimizer_params`` tells a norm by the type of its module; this goes
    by names, as did the recipe of the released detectors. It spared names with "norm" in them: in
    the reference the backbone's ``norm1``, ``norm2`` and ``outnorm0..3``, but neither the
    batch norms of its stem (``patch_embed.conv_down.1``) nor those of the box heads (called ``bn``
    there, ``norm`` here).

    Args:
        model: a model that is not wrapped in DistributedDataParallel.
        no_decay: regular expressions; a parameter in whose name one is found has weight decay 0.
            The others have the optimizer's.

    Returns:
        As few groups as the options need, in the order of their first parameter.

    Raises:
        UserError: an expression is not valid or finds no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    expressions = [_compiled(pattern, names) for pattern in no_decay]
    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group: dict[str, Any] = {"params": [parameter]}
        if any(expression.search(name) for expression in expressions):
            group["weight_decay"] = 0.0
        groups.append(group)
    return reduce_param_groups(groups)


def layer_decay(
    depths: Sequence[int], rate: float, *, prefix: str = "backbone.bottom_up."
) -> Callable[[str], float]:
    """Layer-wise decay of the learning rate (BEiT, arXiv:2106.08254; ViTDet, arXiv:2203.16527).

    The layers of the backbone are its stem, 0, and its blocks, 1 to n = sum(depths) through all
    stages. Layer i learns at ``rate ** (n + 1 - i)`` of the learning rate: the last block at
    ``rate`` of it, the stem slowest. A downsampling is of the layer of the block that it follows.
    The norms of the features, which no classifier has, and all outside the backbone are new layers
    and learn at the whole rate.

    Args:
        depths: blocks of each of the backbone's stages.
        rate: in (0, 1]; with 1 all learn alike.
        prefix: what the names of the backbone's parameters begin with.

    Returns:
        From a parameter's name to the factor on its learning rate: the ``lr_factor_func`` of
        Detectron2's ``get_default_optimizer_params``.

    Raises:
        UserError: the rate is out of range; from the function returned: the backbone has more
            blocks than ``depths`` says.
    """
    if not 0 < rate <= 1:
        raise UserError(f"layer_decay's rate is {rate}; give a number above 0 and up to 1")
    depths = tuple(depths)
    layers = {f"{prefix}patch_embed.": 0}
    for stage, depth in enumerate(depths):
        for block in range(depth):
            layers[f"{prefix}levels.{stage}.blocks.{block}."] = sum(depths[:stage]) + block + 1
        layers[f"{prefix}levels.{stage}.downsample."] = sum(depths[: stage + 1])

    def factor(name: str) -> float:
        for beginning, layer in layers.items():
            if name.startswith(beginning):
                return rate ** (sum(depths) + 1 - layer)
        if name.startswith(f"{prefix}levels."):
            raise UserError(
                f"layer_decay's depths are {depths}, but the model has {name}; "
                "give the backbone's depths"
            )
        return 1.0

    return factor


def _compiled(pattern: str, names: list[str]) -> re.Pattern[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"optimizer.params.no_decay: {pattern!r} is not a regular expression ({error}); mend it"
        ) from error
    if not any(expression.search(name) for name in names):
        raise UserError(
            f"optimizer.params.no_decay: {pattern!r} matches no parameter of the model; mend it"
        )
    return expression


class WarmupMultiStep(ParamScheduler):
    """Linear warm-up, times a learning rate that drops tenfold after given epochs.

    Called with the training's progress in [0, 1) it gives the factor on the learning rate, for
    Detectron2's ``LRMultiplier``.

    Args:
        max_iter: optimizer steps of the whole training.
        epochs: what they are divided into.
        drops: after how many epochs the rate drops, rising. They move with ``max_iter``; the
            warm-up does not.
        warmup_iters: the steps in which the factor rises from ``warmup_factor`` to 1.
        warmup_factor: factor at the first step.
    """

    def __init__(
        self,
        *,
        max_iter: int,
        epochs: int,
        drops: Sequence[int],
        warmup_iters: int,
        warmup_factor: float = 0.001,
    ) -> None:
        self._steps = MultiStepParamScheduler(
            values=[0.1**i for i in range(len(drops) + 1)], milestones=[*drops, epochs]
        )
        self._max_iter = max_iter
        self._warmup_iters = warmup_iters
        self._warmup_factor = warmup_factor

    def __call__(self, where: float) -> float:
        warmed = min(where * self._max_iter / max(self._warmup_iters, 1), 1.0)
        return self._steps(where) * (self._warmup_factor + (1 - self._warmup_factor) * warmed)
