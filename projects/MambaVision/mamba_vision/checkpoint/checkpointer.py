"""Loading and saving a model's weights under Detectron2."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from ..backbone import MambaVision
from ..errors import UserError
from .convert import convert, is_released
from .files import atomic_write, fetch
from .reader import read_checkpoint
from .unpickle import Placeholder

__all__ = ["MambaVisionCheckpointer"]


class MambaVisionCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer that also takes the released files as they are.

    It differs in these ways:

    - a file is read by :func:`~mamba_vision.checkpoint.read_checkpoint`, which runs nothing in it;
    - NVIDIA's ImageNet backbones and mmdetection's detectors, known by their content, are given
      Detectron2's names by :func:`~mamba_vision.checkpoint.convert`;
    - layers of other sizes than the model's, as those for other classes, keep their initial values
      and are reported in one line, but weights of another backbone are an error;
    - parts that the model does not have, as mask heads, are reported in one line;
    - a checkpoint is saved all or nothing.
    """

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load weights, and what else the checkpointer keeps if the file has it.

        Args:
            path: a local file or a URL that Detectron2's PathManager knows, which is downloaded
                once and kept in its cache; an empty one loads nothing.
            *args, **kwargs: as Detectron2's.

        Returns:
            The rest of the checkpoint.

        Raises:
            UserError: the file cannot be had or read, or its weights are of another model.
        """
        try:
            return super().load(fetch(path) if path else path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # which the base class expects, also after an error

    def save(self, name: str, *, last: bool = True, **kwargs: Any) -> None:
        """Write ``<name>.pth`` into the checkpointer's directory.

        Args:
            name: the file's, without its ending.
            last: note it as the newest, from which ``--resume`` goes on.
            **kwargs: what to keep beside the model and the checkpointer's own.

        Raises:
            UserError: it cannot be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        file_name = f"{name}.pth"
        path = os.path.join(self.save_dir, file_name)
        self.logger.info("Saving checkpoint to %s", path)
        with atomic_write(path) as file:
            torch.save(data | kwargs, file)
        if last:
            self.tag_last_checkpoint(file_name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note which file of the directory :meth:`get_checkpoint_file` is to name."""
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    def _load_file(self, filename: str) -> dict[str, Any]:
        data = read_checkpoint(filename)
        if not {"model", "state_dict"} & data.keys():
            data = {"model": data}
        own = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        home = _home(self.model)
        try:
            if not isinstance(data.get("model", {}), dict):
                raise UserError("its 'model' is no dict of weights; give a checkpoint")
            # A backbone by itself has the released names too; its own checkpoints hold them all.
            complete = own.keys() <= data.get("model", {}).keys()
            if "model" not in data or (is_released(data) and not complete):
                conversion = convert(data, prefix=home)
                self.logger.info("%s:\n%s", filename, conversion)
                data = {"model": conversion.weights}
            _check(data["model"], own, home)
        except UserError as error:
            raise UserError(f"{filename}: {error}") from None
        return data

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        resized = {name for name, *_ in incompatible.incorrect_shapes}
        missing = [name for name in incompatible.missing_keys if name not in resized]
        return incompatible._replace(missing_keys=missing)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        layers = {
            re.sub(r"\.\d+\.", ".*.", name.rpartition(".")[0]): None
            for name, *_ in incompatible.incorrect_shapes
        }
        if layers:
            self.logger.warning(
                "Not loaded, for their sizes differ (as for other classes): %s", ", ".join(layers)
            )
        if incompatible.unexpected_keys:
            own = {name for name, _ in self.model.named_modules()} | {""}
            parts = Counter(_unknown_part(name, own) for name in incompatible.unexpected_keys)
            counts = ", ".join(f"{part} ({count})" for part, count in parts.items())
            self.logger.warning("Not used, for the model has no such part (tensors): %s", counts)
        super()._log_incompatible_keys(
            incompatible._replace(incorrect_shapes=[], unexpected_keys=[])
        )


def _unknown_part(name: str, own: set[str]) -> str:
    """The beginning of a parameter's name that reaches beyond the model's modules, ``own``."""
    words = name.split(".")
    return next(
        part for part in (".".join(words[: i + 1]) for i in range(len(words))) if part not in own
    )


def _home(model: nn.Module) -> str:
    """Where a model keeps its MambaVision, as a prefix; Detectron2's custom if it has none."""
    for name, module in model.named_modules():
        if isinstance(module, MambaVision):
            return f"{name}." if name else ""
    return "backbone.bottom_up."


def _check(weights: dict[str, Any], own: dict[str, tuple[int, ...]], home: str) -> None:
    """Refuse weights of which none is the model's, or whose backbone is of another size."""
    for name, value in weights.items():
        if not isinstance(value, (Tensor, np.ndarray)):
            kind = value.name if isinstance(value, Placeholder) else type(value).__name__
            raise UserError(f"its weight {name!r} is a {kind}, not a tensor; give a checkpoint")
    shapes = {name.removeprefix("module."): tuple(value.shape) for name, value in weights.items()}
    if not own.keys() & shapes.keys():
        raise UserError(
            f"none of its {len(weights)} weights is the model's; it has names like "
            f"{', '.join(list(shapes)[:3])}; give weights of this model, or another config"
        )
    for name, shape in shapes.items():
        if name.startswith(home) and own.get(name, shape) != shape:
            raise UserError(
                f"its backbone is of another size: {name} is {shape}, the model's is {own[name]}; "
                "give weights of the model's variant, or another config"
            )
