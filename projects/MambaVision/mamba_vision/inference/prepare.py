"""A detector as it is to be used: a copy that computes the same in less time.

Shape legend: N images; R_i RoIs of image i.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import detectron2.layers
import torch
from detectron2.modeling import FPN, GeneralizedRCNN
from torch import Tensor, nn

from ..backbone import MambaVision
from ..backbone.mixer import MambaVisionMixer
from ..precision import autocast, precision
from ..proposal_generator import RPN, AnchorGenerator
from ..roi_heads import ClassSpecificCascadeROIHeads, ROIPooler
from .fuse import fuse as fold_norms
from .graphs import Graphs

__all__ = ["Prepared", "prepare"]

PROPOSALS = 1000  # that an image's are padded to, where none of Detectron2's RPNs tells how many
FEW = 16  # detections: images with no more than these have smaller graphs of their own
CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, detectron2.layers.Conv2d)

Rois = tuple[Tensor, ...]  # what is known of one image's RoIs, R_i rows each


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
        cuda_graphs: on a GPU, launch the kernels of the backbone, of the proposal generator up to
            non-maximum suppression, of the cascade and of the mask heads as CUDA graphs. They are
            recorded when an image of some padded size is met for the second time.

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
    for part in _known_parts(model):
        # The maps are so in memory; else a convolution's weights would be turned at every call.
        part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if dtype:
            _cast_weights(part, precision(dtype, key))
    graphs = Graphs(tensor.device)
    if cuda_graphs and tensor.device.type == "cuda":
        use_graphs(model, graphs)
    return Prepared(model, context, graphs)


class Prepared(nn.Module):
    """What :func:`prepare` makes; it stays in eval mode.

    Attributes:
        model: the copy. Parts of it that are graphs give tensors that the next call overwrites.
        graphs: its CUDA graphs, which counts them.
    """

    def __init__(self, model: nn.Module, context: AbstractContextManager, graphs: Graphs) -> None:
        super().__init__()
        self.model = model
        self.graphs = graphs
        self._context = context
        super().train(False)

    def train(self, mode: bool = True) -> Prepared:
        """Do nothing: what it was made for is inference."""
        return self

    def forward(self, inputs: list[dict]) -> list[dict]:
        """See :meth:`detectron2.modeling.GeneralizedRCNN.forward`, in eval mode."""
        # Tensors of the inference mode could not be written to when a later call is made outside.
        with torch.inference_mode(False), torch.no_grad(), self._context:
            return self.model(inputs)


def use_graphs(model: nn.Module, graphs: Graphs) -> None:
    """Let those parts of a detector that are known to allow it run as graphs."""
    for part in _known_parts(model):
        if isinstance(part, RPN):
            # Detectron2's anchors are copied from the CPU, for which it waits.
            if isinstance(part.anchor_generator, AnchorGenerator):
                graphs.install(part, "candidates")
        elif isinstance(part, ClassSpecificCascadeROIHeads):
            counts = getattr(model.proposal_generator, "post_nms_topk", {False: PROPOSALS})
            _use_graphs_for_rois(part, graphs, counts[False])
        else:
            graphs.install(part, "forward")


def _use_graphs_for_rois(
    heads: ClassSpecificCascadeROIHeads, graphs: Graphs, proposals: int
) -> None:
    # Detectron2's pooler waits for the device at every level, which no graph can do.
    if isinstance(heads.box_pooler, ROIPooler):
        graphs.install(heads, "run_cascade", partial(_Padded, counts=(proposals,)))
    if heads.mask_on and isinstance(heads.mask_pooler, ROIPooler):
        most = max(heads.box_predictor[-1].test_topk_per_image, FEW)
        graphs.install(heads, "run_masks", partial(_Padded, counts=(FEW, most)))


def _known_parts(model: nn.Module) -> list[nn.Module]:
    """Those of a detector's three parts that are this package's."""
    if type(model) is not GeneralizedRCNN:
        return []
    parts: list[Any] = [model.backbone, model.proposal_generator, model.roi_heads]
    backbone, rpn, heads = parts
    bottom_up = backbone.bottom_up if type(backbone) is FPN else backbone
    known = (
        type(bottom_up) is MambaVision,
        type(rpn) is RPN,
        type(heads) is ClassSpecificCascadeROIHeads,
    )
    return [part for part, is_known in zip(parts, known) if is_known]


def _cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast what autocast would cast whenever it is used."""
    kept: set[Any] = set()
    for mixer in module.modules():
        if isinstance(mixer, MambaVisionMixer):  # these go to the operators, as they are
            kept |= {mixer.conv1d_x.weight, mixer.conv1d_z.weight, mixer.dt_proj.bias}
    for layer in module.modules():
        if type(layer) in CAST:
            for parameter in set(layer.parameters(recurse=False)) - kept:
                parameter.data = parameter.data.to(dtype)


class _Padded:
    """A function of RoIs, called with one of a few numbers of them; the rest are zeros.

    Args:
        function: of feature maps and of N images' RoIs; gives tensors with a row for each of them.
            No row may depend on another.
        counts: ascending; more RoIs than the last are not padded.
    """

    def __init__(
        self, function: Callable[[list[Tensor], list[Rois]], list[Rois]], counts: Sequence[int]
    ) -> None:
        self._function = function
        self._counts = counts

    def __call__(self, features: list[Tensor], rois: list[Rois]) -> list[Rois]:
        """The function's results without the rows of the padding, in memory of their own."""
        lengths = [len(of_image[0]) for of_image in rois]
        count = next((c for c in self._counts if c >= max(lengths)), None)
        if count is None:
            return self._function(features, rois)
        padded = [tuple(_pad(x, count) for x in of_image) for of_image in rois]
        found = self._function(features, padded)
        return [
            tuple(x[:length].clone() for x in of_image) for of_image, length in zip(found, lengths)
        ]


def _pad(x: Tensor, count: int) -> Tensor:
    return torch.cat([x, x.new_zeros(count - len(x), *x.shape[1:])])
