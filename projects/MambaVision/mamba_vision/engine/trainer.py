"""One step of training: accumulation, mixed precision, and what to do when it goes wrong.

Shapes:
    a step's data are the images of one process, B = total_batch_size / processes of them; they go
    through the model in ``accumulate`` micro-batches of B / accumulate.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..errors import UserError
from ..proposals import to_device
from ..randomness import seed_all
from ..recorder import copy_each
from ..scalars import begin_flush
from ..transfer import send

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


def _is_no_user_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))


# Detectron2 logs the traceback of whatever ends a training; a UserError says all by itself.
logging.getLogger(SimpleTrainer.__module__).addFilter(_is_no_user_error)

Batch = list[dict[str, Any]]
Learn = Callable[[], tuple[dict[str, float], list[bool]]]


class Trainer(SimpleTrainer):
    """Detectron2's training loop, with a step of its own.

    - The gradient of a step is the mean over ``accumulate`` micro-batches, between which processes
      do not talk.
    - The losses, and what the model logs by :mod:`mamba_vision.scalars`, come from the device in
      one transfer, during the backward pass.
    - Every step draws its random numbers from a stream of its own (:mod:`mamba_vision.randomness`).
    - A step whose loss is infinite or NaN in any process is skipped: it is logged and written down,
      weights and batch norms' statistics stay, and ``max_nonfinite`` in a row stop the run.
    - Whether to stop, and which images could not be used, are known to all processes after a step:
      then ``stopping`` is set, and ``failure`` if it is for too many bad images.

    Args:
        model: on its device; bare or in ``DistributedDataParallel``.
        data_loader: gives the data of a step, a list of B images as Detectron2's models take them.
        optimizer: steps once per step.
        seed: of the run; equal in all processes.
        accumulate: micro-batches per step; divides B.
        dtype: what autocast computes in, or ``None`` for no autocast. With float16 gradients are
            scaled, and steps whose gradients overflow skipped, by ``torch.amp.GradScaler``.
        max_nonfinite: how many steps in a row without a finite loss stop the run.
        output_dir: where ``nonfinite.jsonl`` goes.
        stop_requested: whether this process has been asked to stop.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: Optimizer,
        *,
        seed: int,
        accumulate: int = 1,
        dtype: torch.dtype | None = None,
        max_nonfinite: int = 1,
        output_dir: str | Path = ".",
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.device = next(model.parameters()).device
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=dtype is torch.float16)
        self.stopping = False
        self.failure: UserError | None = None
        self._seed = seed
        self._accumulate = accumulate
        self._dtype = dtype
        self._max_nonfinite = max_nonfinite
        self._nonfinite = 0  # steps in a row
        self._output = Path(output_dir)
        self._stop_requested = stop_requested
        norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self._statistics_before = [buffer.clone() for buffer in self._statistics]

    def run_step(self) -> None:
        """Train on the next batch.

        Raises:
            UserError: the GPU's memory is used up, or too many losses in a row were not finite.
        """
        assert self.model.training, "the model was left in eval mode"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        seed_all(self._seed, self.iter, comm.get_rank())
        self.optimizer.zero_grad()
        copy_each(self._statistics, self._statistics_before)
        bad = getattr(self.data_loader, "bad_images", None)
        flags = self._stop_requested(), bad is not None and bad.has_news()
        try:
            learn = self._accumulate_gradients(data, flags)
        except torch.OutOfMemoryError as error:
            raise UserError(_out_of_memory(data, self.iter, self._accumulate)) from error
        values, (not_finite, self.stopping, new_bad) = learn()
        if new_bad and bad is not None:
            bad.merge(comm.all_gather(bad.take_news()))
            try:
                bad.check()
            except UserError as error:
                self.stopping, self.failure = True, error
        if not_finite:
            self._skip(data, values)
            return
        self._nonfinite = 0
        self.after_backward()
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        # while the device takes the step
        self._write_metrics({k: torch.tensor(value) for k, value in values.items()}, data_time)

    def after_train(self) -> None:
        """Close the hooks; what they raise does not hide why the training stopped."""
        stopped = sys.exc_info()[1] is not None
        self._data_loader_iter_obj = None  # the workers are no longer needed
        try:
            super().after_train()
        except Exception:
            if not stopped:
                raise
            logger.exception("While closing the training:")

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | {
            "optimizer": _contiguous(state["optimizer"]),
            "grad_scaler": self.grad_scaler.state_dict(),
            "seed": self._seed,
            "nonfinite": self._nonfinite,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"optimizer": self._as_here(state_dict["optimizer"])})
        _lay_like_parameters(self.optimizer)
        self._seed = state_dict.get("seed", self._seed)
        self._nonfinite = state_dict.get("nonfinite", 0)
        scaler = state_dict.get("grad_scaler")
        if scaler and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(scaler)

    def _as_here(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state, to be stepped as the config says, not as the checkpoint's was."""
        here = {k: v for k, v in self.optimizer.defaults.items() if k == "fused"}
        return optimizer | {"param_groups": [group | here for group in optimizer["param_groups"]]}

    def _accumulate_gradients(self, data: Batch, flags: Sequence[bool]) -> Learn:
        """Set the gradients; returns what :meth:`_ask` does, of means over the micro-batches."""
        size = len(data) // self._accumulate
        total: dict[str, Tensor] = {}
        for k in range(self._accumulate):
            last = k == self._accumulate - 1
            with contextlib.ExitStack() as stack:
                if not last and isinstance(self.model, DistributedDataParallel):
                    stack.enter_context(self.model.no_sync())
                with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
                    losses = self.model(send(data[k * size : (k + 1) * size], self.device))
                    if isinstance(losses, Tensor):
                        losses = {"total_loss": losses}
                    losses = {name: loss / self._accumulate for name, loss in losses.items()}
                    loss = sum(losses.values())
                for name, x in losses.items():
                    total[name] = total[name] + x.detach() if name in total else x.detach()
                if last:  # so that the next step can be prepared while this one goes backward
                    learn = self._ask(total, flags)
                self.grad_scaler.scale(loss).backward()
        return learn

    def _ask(self, losses: Mapping[str, Tensor], flags: Sequence[bool]) -> Learn:
        """Let the device send a step's numbers, all at once, with what the model logged.

        Returns:
            What waits for them, and returns the losses of this process; and whether in any process
            a loss is not finite, and for each flag whether it is set in any.
        """
        values = torch.stack([loss.float() for loss in losses.values()])
        given = to_device(flags, self.device)
        anywhere = torch.cat([(~values.isfinite().all()).float()[None], given])
        if comm.get_world_size() > 1:
            dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        end = begin_flush(torch.cat([anywhere, values]))

        def learn() -> tuple[dict[str, float], list[bool]]:
            numbers = end()
            count = len(anywhere)
            own = dict(zip(losses, numbers[count:], strict=True))
            return own, [number > 0 for number in numbers[:count]]

        return learn

    def _skip(self, data: Batch, losses: Mapping[str, float]) -> None:
        """Leave the model as it was, and say of which images the loss was not finite."""
        copy_each(self._statistics_before, self._statistics)
        self._nonfinite += 1
        records = comm.gather(
            {
                "iteration": self.iter,
                "process": comm.get_rank(),
                "images": [{"file_name": x.get("file_name"), "size": _size(x)} for x in data],
                "losses": {name: _number(loss) for name, loss in losses.items()},
            }
        )
        for record in records:
            logger.warning(
                "Step %d skipped (%d in a row), its loss being infinite or NaN: %s of %s",
                self.iter + 1,
                self._nonfinite,
                ", ".join(f"{name} = {value}" for name, value in record["losses"].items()),
                ", ".join(f"{image['file_name']}" for image in record["images"]),
            )
        path = self._output / "nonfinite.jsonl"
        if records:
            self._output.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
        if self._nonfinite >= self._max_nonfinite:
            raise UserError(
                f"training stopped at step {self.iter + 1}, its loss being infinite or NaN "
                f"{self._nonfinite} times in a row (train.max_nonfinite); lower optimizer.lr, or "
                f"check the images and losses listed in {path}"
            )


def _contiguous(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state as any training can take it, also one without channels last."""
    states = {
        index: {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in state.items()}
        for index, state in optimizer["state"].items()
    }
    return optimizer | {"state": states}


def _lay_like_parameters(optimizer: Optimizer) -> None:
    """Put an optimizer's averages into memory as its parameters are.

    Fused optimizers walk through both side by side, and do not look whether they may.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)


def _size(image: Mapping[str, Any]) -> list[int]:
    return list(image["image"].shape[-2:]) if "image" in image else []


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON knows no NaN


def _out_of_memory(data: Sequence[Mapping[str, Any]], iteration: int, accumulate: int) -> str:
    sizes = ", ".join(" x ".join(map(str, _size(image))) for image in data)
    many = len(data) > accumulate
    remedies = [
        *([f"raise train.accumulate (now {accumulate})"] if many else []),
        "lower the sizes in dataloader.train.mapper.augmentations",
        "set model.backbone.bottom_up.activation_checkpointing=true",
        "set train.amp.enabled=true",
    ]
    return (
        f"the GPU's memory is used up in step {iteration + 1}, on images of {sizes} pixels "
        f"(height x width), {len(data) // accumulate} at a time; {', or '.join(remedies)}"
    )
