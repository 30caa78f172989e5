"""Metrics and pictures for Weights & Biases."""

from __future__ import annotations

import importlib.util
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any

from detectron2.utils.events import EventWriter, get_event_storage
from omegaconf import DictConfig, OmegaConf

from ...checkpoint.files import atomic_write
from ...errors import UserError

__all__ = ["WandbWriter", "check_wandb"]


def check_wandb(project: str) -> None:
    """Check that the package wandb, which is optional, is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"train.wandb_project={project} needs Weights & Biases, which is not installed; "
            "run pip install wandb, or leave it empty"
        )


class WandbWriter(EventWriter):
    """Logs what Detectron2's TensorBoard writer logs, smoothed alike, and the file ``config.yaml``.

    A resumed training goes on with its run, whose identity the output folder's file ``wandb_id``
    keeps. Where another writer drops the pictures that it has written, as TensorBoard's does, this
    one has to come before it.

    Args:
        train: ``wandb_project`` and ``output_dir`` are used; all of it is noted with the run.
        window_size: a loss is logged as its median over so many steps.
        drop_pictures: whether no other writer does.

    Raises:
        UserError: the package is not installed as it should be, or the run cannot be started.
    """

    def __init__(
        self, train: DictConfig, window_size: int = 20, drop_pictures: bool = False
    ) -> None:
        check_wandb(train.wandb_project)
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"train.wandb_project={train.wandb_project}: wandb cannot be imported: {error}; "
                "install it anew, or leave it empty"
            ) from error

        folder = Path(train.output_dir)
        identity = folder / "wandb_id"
        if not identity.is_file():
            with atomic_write(identity) as file:
                file.write(uuid.uuid4().hex[:8].encode())
        try:
            self._run = wandb.init(
                project=train.wandb_project,
                name=folder.name,
                dir=str(folder),
                config=OmegaConf.to_container(train),
                id=identity.read_text(),
                resume="allow",
            )
        except Exception as error:  # wandb's own, which other versions name otherwise
            reason = str(error).split("\n", 1)[0].rstrip(".")
            raise UserError(
                f"train.wandb_project={train.wandb_project}: {reason}; run wandb login, or set "
                "WANDB_MODE=offline"
            ) from error
        # A resumed training may go back some steps, which wandb's own count cannot.
        self._run.define_metric("*", step_metric="iteration")
        if (folder / "config.yaml").is_file():
            self._run.save(str(folder / "config.yaml"), base_path=str(folder))
        self._image = wandb.Image
        self._window_size = window_size
        self._drop_pictures = drop_pictures
        self._last_write = -1

    def write(self) -> None:
        storage = get_event_storage()
        steps: dict[int, dict[str, Any]] = defaultdict(dict)
        for name, (value, step) in storage.latest_with_smoothing_hint(self._window_size).items():
            if step > self._last_write:
                steps[step][name] = value
        self._last_write = max(steps, default=self._last_write)
        for name, picture, step in storage._vis_data:  # Detectron2 has no other way to them
            steps[step][name] = self._image(picture.transpose(1, 2, 0))
        for step in sorted(steps):
            self._run.log({"iteration": step, **steps[step]})
        if self._drop_pictures:
            storage.clear_images()

    def close(self) -> None:
        self._run.finish()
