"""What is kept and looked at beside the steps of a training."""

from __future__ import annotations

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from omegaconf import DictConfig

from ..checkpoint import MambaVisionCheckpointer
from .checkpoints import BestCheckpointer
from .evaluation import do_test
from .hooks import EMA, EarlyStopping, draw_predictions, validation_loss

__all__ = ["Watch"]


class Watch:
    """The average of the weights, and the evaluations and their consequences, as switched on.

    Args:
        config: ``train`` and ``dataloader`` are used.
        checkpointer: the training's, which gets the average to keep.

    Attributes:
        ema: the hook that averages; before those that save or evaluate.
        evaluated: of the model that is evaluated: the average, or the model in training.
        stopping: the hook that stops early.
    """

    def __init__(self, config: DictConfig, checkpointer: MambaVisionCheckpointer) -> None:
        train = config.train
        self._config = config
        self._trained = checkpointer
        self.ema: EMA | None = None
        self.evaluated = checkpointer
        if train.get("ema_decay"):
            self.ema = EMA(checkpointer.model, train.ema_decay)
            checkpointer.add_checkpointable("ema", self.ema.averaged)
            self.evaluated = MambaVisionCheckpointer(self.ema.model, train.output_dir)
        self._best: BestCheckpointer | None = None
        self.stopping: EarlyStopping | None = None
        metric, patience = train.get("best_metric"), train.get("patience")
        if metric and train.eval_period and config.dataloader.get("evaluator") is not None:
            if comm.is_main_process():
                self._best = BestCheckpointer(train.eval_period, self.evaluated, metric)
            if patience:
                self.stopping = EarlyStopping(train.eval_period, patience, self._best)

    def hooks(self) -> list[HookBase | None]:
        """Those of the evaluation, in order."""
        evaluation = hooks.EvalHook(self._config.train.eval_period, self.evaluate)
        return [evaluation, self._best, self.stopping]

    def test(self) -> dict[str, dict[str, float]]:
        """Evaluate the average, or the model where there is none; in all processes together."""
        averaged = self.ema is not None and self.ema.started
        return do_test(self._config, (self.evaluated if averaged else self._trained).model)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Look at all that is to be looked at; in all processes together."""
        train = self._config.train
        results = self.test()
        if train.get("val_loss"):
            losses = validation_loss(self._config, self._trained.model)
            # Detectron2's printer repeats whatever has "loss" in its name, in every line.
            results["val"] = {name.removeprefix("loss_"): x for name, x in losses.items()}
        if train.get("draw_images"):
            draw_predictions(self._config, self.evaluated.model)
        return results

    def finish(self, step: int) -> None:
        """Write the average, if there is one, to ``model_ema.pth``, once the training is done.

        Args:
            step: the last, counted from 0.
        """
        if self.ema is not None and comm.is_main_process():
            self.evaluated.save("model_ema", last=False, iteration=step)
