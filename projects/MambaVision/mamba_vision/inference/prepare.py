"""A detector as it is to be used: a copy that computes the same in less time."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import torch
from detectron2.modeling import FPN, GeneralizedRCNN
from torch import nn

from ..backbone import MambaVision
from ..precision import autocast, cast_weights, precision
from ..proposal_generator import RPN, AnchorGenerator
from ..roi_heads import ClassSpecificCascadeROIHeads, ClassSpecificOutputLayers, ROIPooler
from ..transfer import send
from .detector import GraphedDetector
from .fuse import fuse as fold_norms
from .graphs import Graphs

__all__ = ["Prepared", "prepare"]


def prepare(
    model: nn.Module,
    *,
    dtype: str | torch.dtype | None = None,
    fuse: bool = True,
    cuda_graphs: bool = True,
) -> Prepared:
    """Copy a detector for inference.

    The copy is called as the model is and gives the same to rounding; the model is left as it is.
    Changes made to the model's weights later do not reach the copy. What is not known, in a model
    or as a model, runs as before.

    Args:
        model: on the device that it is to be used on; any of Detectron2's form.
        dtype: run under autocast with this precision, ``"fp16"``, ``"bf16"`` or PyTorch's; the
            weights of convolutions and linear layers, which autocast would cast at every call, are
            cast now. None leaves precision to the caller.
        fuse: fold batch norms into convolutions (:func:`~mamba_vision.inference.fuse`).
        cuda_graphs: on a GPU, launch the kernels of the backbone, those from there to the
            detections, and those of the mask heads as CUDA graphs. They are recorded when an image
            of some padded size is met for the second time, with the thresholds that the model then
            has.

    Returns:
        A module in eval mode, for one thread.

    Raises:
        UserError: there is no such precision, or the device does not have it.
    """
    tensor = next(model.parameters(), torch.empty(0))
    key = "prepare's argument dtype"
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    context = autocast(dtype, tensor.device, key)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if fuse:
        fold_norms(model)
    for part in filter(None, _known_parts(model)):
        # The maps are so in memory; else a convolution's weights would be turned at every call.
        part.to(memory_format=torch.channels_last)
        if dtype:
            cast_weights(part, precision(dtype, key))
    prepared = Prepared(model, context)
    if cuda_graphs and tensor.device.type == "cuda":
        prepared.use_graphs(Graphs(tensor.device))
    return prepared


class Prepared(nn.Module):
    """What :func:`prepare` makes; it stays in eval mode.

    Attributes:
        model: the copy. Parts of it that are graphs give tensors that the next call overwrites.
        graphs: its CUDA graphs, which counts them; None if it has none.
    """

    def __init__(self, model: nn.Module, context: AbstractContextManager) -> None:
        super().__init__()
        self.model = model
        self._context = context
        self._device = next(model.parameters(), torch.empty(0)).device
        self.graphs: Graphs | None = None
        self._detector: GraphedDetector | None = None
        super().train(False)

    def use_graphs(self, graphs: Graphs) -> None:
        """Let those parts of the model that are known to allow it run as graphs."""
        self.graphs = graphs
        backbone, rpn, heads = _known_parts(self.model)
        if backbone is not None:
            graphs.install(backbone, "forward")
        # Detectron2's anchors are copied from the CPU, for which it waits.
        if rpn is None or not isinstance(rpn.anchor_generator, AnchorGenerator):
            return
        if heads is not None and _never_wait(heads):
            self._detector = GraphedDetector(self.model, graphs)
        else:
            graphs.install(rpn, "candidates")

    def train(self, mode: bool = True) -> Prepared:
        """Do nothing: what it was made for is inference."""
        return self

    def forward(self, inputs: list[dict]) -> list[dict]:
        """See :meth:`detectron2.modeling.GeneralizedRCNN.forward`, in eval mode."""
        # Tensors of the inference mode could not be written to when a later call is made outside.
        with torch.inference_mode(False), torch.no_grad(), self._context:
            inputs = send(inputs, self._device)
            return self.model(inputs) if self._detector is None else self._detector(inputs)


def _known_parts(model: nn.Module) -> list[Any]:
    """A detector's backbone, RPN and heads; None for those that are not this package's."""
    if type(model) is not GeneralizedRCNN:
        return [None, None, None]
    parts: list[Any] = [model.backbone, model.proposal_generator, model.roi_heads]
    backbone, rpn, heads = parts
    bottom_up = backbone.bottom_up if type(backbone) is FPN else backbone
    known = (
        type(bottom_up) is MambaVision,
        type(rpn) is RPN,
        type(heads) is ClassSpecificCascadeROIHeads,
    )
    return [part if is_known else None for part, is_known in zip(parts, known)]


def _never_wait(heads: ClassSpecificCascadeROIHeads) -> bool:
    """Whether the parts are this package's where Detectron2's would wait for the device."""
    poolers = [heads.box_pooler, *([heads.mask_pooler] if heads.mask_on else [])]
    own = type(heads.box_predictor[-1]) is ClassSpecificOutputLayers
    return own and all(isinstance(pooler, ROIPooler) for pooler in poolers)
