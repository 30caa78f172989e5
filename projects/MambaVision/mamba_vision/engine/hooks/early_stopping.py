"""Stopping a training that gets no better."""

from __future__ import annotations

from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from ..checkpoints import BestCheckpointer

__all__ = ["EarlyStopping", "StopTraining"]


class StopTraining(BaseException):
    """Ends a training that did what it could.

    No ``Exception``, of which Detectron2 logs the traceback.
    """


class EarlyStopping(HookBase):
    """Ends the training after so many evaluations in a row without a new best.

    Register it after ``best``, in all processes, which it stops in the same step.

    Args:
        eval_period: steps from an evaluation to the next.
        patience: how many evaluations.
        best: who knows what is best; used in the main process.

    Raises:
        StopTraining: in :meth:`after_step`.
    """

    def __init__(self, eval_period: int, patience: int, best: BestCheckpointer | None) -> None:
        self._period = eval_period
        self._patience = patience
        self._best = best
        self._in_vain = 0

    @property
    def exhausted(self) -> bool:
        return self._in_vain >= self._patience

    def after_step(self) -> None:
        step = self.trainer.iter + 1
        if step % self._period or step == self.trainer.max_iter:  # when EvalHook does not evaluate
            return
        best = comm.all_gather(self._best and self._best.best_iter)[0]
        if best is None or best == self.trainer.iter:
            self._in_vain = 0
        else:
            self._in_vain += 1
        if self.exhausted:
            raise StopTraining(
                f"{self._in_vain} evaluations without a better one than that of step {best + 1}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"in_vain": self._in_vain}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._in_vain = state_dict["in_vain"]
