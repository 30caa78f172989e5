"""Which checkpoints are written, and which of them stay."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from detectron2.engine import hooks

from ..checkpoint import MambaVisionCheckpointer
from ..checkpoint.files import atomic_write

__all__ = ["BestCheckpointer", "PeriodicCheckpointer"]


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's hook, which besides

    - writes a checkpoint when its trainer is stopping,
    - counts the checkpoints from before ``--resume`` among those that ``max_to_keep`` limits.
    """

    period: int

    def before_train(self) -> None:
        super().before_train()
        if self.trainer.start_iter == 0:
            return
        name = re.compile(rf"{re.escape(self.file_prefix)}_(\d{{7,}})\.pth")
        earlier = []
        for file in self.checkpointer.get_all_checkpoint_files():
            match = name.fullmatch(Path(file).name)
            if match and int(match[1]) < self.trainer.start_iter:
                earlier.append(file)
        self.recent_checkpoints = sorted(earlier)[-(self.max_to_keep or 0) :]
        for file in set(earlier).difference(self.recent_checkpoints):
            self.path_manager.rm(file)  # a killed process had not come to that

    def after_step(self) -> None:
        period = self.period
        self.period = 1 if self.trainer.stopping else period
        super().after_step()
        self.period = period


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook, whose best value so far outlives ``--resume``.

    ``model_best.pth`` is a whole checkpoint; ``model_best.json`` beside it tells the metric, its
    value and the step. ``--resume`` goes on from the newest checkpoint all the same.

    Args:
        eval_period: the evaluation hook's, in steps.
        checkpointer: where it saves to.
        metric: what is to be as high as possible, e.g. ``"segm/AP"``.
    """

    def __init__(self, eval_period: int, checkpointer: MambaVisionCheckpointer, metric: str):
        super().__init__(
            eval_period, SimpleNamespace(save=partial(checkpointer.save, last=False)), metric
        )
        self._path = Path(checkpointer.save_dir) / f"{self._file_prefix}.json"

    def before_train(self) -> None:
        if self.trainer.start_iter > 0 and self._path.is_file():
            best = json.loads(self._path.read_text())
            if best["metric"] == self._val_metric:
                self.best_metric, self.best_iter = best["value"], best["iteration"]

    def _best_checking(self) -> None:
        before = self.best_iter
        super()._best_checking()
        if self.best_iter != before:
            best = {
                "metric": self._val_metric,
                "value": self.best_metric,
                "iteration": self.best_iter,
            }
            with atomic_write(self._path) as file:
                file.write(json.dumps(best, indent=2).encode())
