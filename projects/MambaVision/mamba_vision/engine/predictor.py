"""A trained detector on single image files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import Instances
from omegaconf import DictConfig

from ..checkpoint import MambaVisionCheckpointer
from ..errors import UserError
from .evaluation import prepare_for_test

__all__ = ["Predictor", "dataset_metadata"]


class Predictor:
    """Detects objects in an image file, read and resized as the config's test set is.

    Args:
        config: ``model``, ``dataloader.test``, ``train.eval_amp``, ``train.fuse_eval`` and
            ``train.cuda_graphs`` are used; it is not changed.
        weights: what ``train.init_checkpoint`` takes.
        device: ``None`` means the GPU if there is one, else the CPU.

    Attributes:
        metadata: Detectron2's metadata of the test set: ``thing_classes`` and the like, if known.

    Raises:
        UserError: the weights cannot be read, there is no such device, or it does not have the
            precision of ``train.eval_amp``.
    """

    def __init__(
        self, config: DictConfig, weights: str | Path, device: str | torch.device | None = None
    ) -> None:
        self.metadata = dataset_metadata(config)
        self._mapper = instantiate(copy.deepcopy(config.dataloader.test.mapper))
        model = instantiate(config.model)
        MambaVisionCheckpointer(model).load(str(weights))
        self.model = prepare_for_test(config, model.to(_device(device)))

    def __call__(self, path: str | Path) -> Instances:
        """Detect the objects in one image.

        Args:
            path: of an image file.

        Returns:
            On the CPU, in pixels of the file's image, turned upright as its EXIF data say:
            ``pred_boxes`` (N, 4), ``scores`` (N,) descending, ``pred_classes`` (N,) and, if the
            model makes masks, ``pred_masks`` (N, H, W).

        Raises:
            UserError: the file cannot be read as an image.
        """
        try:
            sample: dict[str, Any] = self._mapper({"file_name": str(path)})
        except UserError:
            raise
        except Exception as error:  # decoders raise whatever they please
            reason = str(error).split("\n", 1)[0]
            raise UserError(f"cannot read image {path}: {reason}; replace the file") from error
        found = self.model([sample])[0]["instances"].to("cpu")
        found.scores = found.scores.float()  # numpy knows no bfloat16
        return found


def dataset_metadata(config: DictConfig) -> Metadata:
    """Detectron2's metadata of a config's test set; the classes are read if need be."""
    names = config.dataloader.test.dataset.names
    name = names if isinstance(names, str) else names[0]
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None and Path(metadata.get("json_file", "")).is_file():
        DatasetCatalog.get(name)  # a data set of the user's own: its file names the classes
    return metadata


def _device(wanted: str | torch.device | None) -> torch.device:
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(
            f"device {wanted} cannot be used on this machine; leave it out, or give cpu"
        ) from error
    return device
