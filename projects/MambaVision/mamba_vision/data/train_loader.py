"""A training data loader that a checkpoint can put back to its place.

What a batch holds, and how its images are augmented, depends on the seed and on the place in the
stream of images (:mod:`.sampling`), not on the number of workers or on how far they read ahead.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from detectron2.data import DatasetFromList
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch import Tensor
from torch.utils import data as torchdata

from ..errors import UserError
from ..randomness import seeded
from ..transfer import pin
from .bad_images import BadImages
from .sampling import Cursor, GroupSampler, Sample

__all__ = ["TrainLoader", "build_train_loader"]

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Mapper = Callable[[Record], Record]

DEATHS = 2  # of workers on an image, after which it is not tried again


def build_train_loader(
    dataset: list[Record] | torchdata.Dataset,
    *,
    mapper: Mapper,
    sampler: Any = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    max_bad_images: int = 10,
    pin_memory: bool | None = None,
    **kwargs: Any,
) -> TrainLoader:
    """As Detectron2's ``build_detection_train_loader``, but for :class:`TrainLoader`.

    Annotations whose box has no area are left out, and their images counted among the bad ones.

    Args:
        dataset: records, or a map-style data set of records.
        mapper: from a record to what the model takes.
        sampler: one of Detectron2's for training; by default ``TrainingSampler``.
        total_batch_size: images of all processes together.
        aspect_ratio_grouping: let a process's batch hold only images that are wider than high, or
            only such that are not; for a list of records with ``width`` and ``height``.
        num_workers: processes that load, for each process that trains; with 0 it loads itself.
        max_bad_images: see :class:`TrainLoader`. The training tool puts ``train.max_bad_images``
            here.
        pin_memory: see :class:`TrainLoader`. With ``None`` the training tool pins for a GPU; no one
            else does.
        **kwargs: for ``torch.utils.data.DataLoader``, as ``prefetch_factor``.

    Raises:
        UserError: the batch cannot be shared evenly by the processes, or the data set cannot be
            grouped.
    """
    processes = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % processes:
        raise UserError(
            f"dataloader.train.total_batch_size={total_batch_size} cannot be shared by {processes} "
            f"processes evenly; make it a multiple of {processes}"
        )
    bad_images = BadImages(max_bad_images)
    kinds = _kinds(dataset) if aspect_ratio_grouping else None
    if isinstance(dataset, list):
        dataset = DatasetFromList(_without_empty_boxes(dataset, bad_images), copy=False)
    groups = GroupSampler(
        TrainingSampler(len(dataset)) if sampler is None else sampler,  # type: ignore[arg-type]
        total_batch_size // processes,
        kinds,
    )
    return TrainLoader(
        dataset,
        mapper,
        groups,
        bad_images,
        num_workers=num_workers,
        pin_memory=pin_memory,
        **kwargs,
    )


class TrainLoader:
    """Endless batches of mapped records, each a list.

    An image that cannot be read is replaced by the next of its kind in the data set. When a worker
    dies, all are started anew and nothing is lost; an image on which two died is taken for one that
    cannot be read.

    Attributes:
        bad_images: those images, and others that there was something about.
        pin_memory: give out tensors, boxes, bitmap masks and instances of these in pinned memory,
            from which a GPU takes them without being waited for. With workers a thread copies them
            there, and all that is read ahead, ``num_workers`` times ``prefetch_factor`` images with
            their masks, may lie there. To be set before the first batch.
    """

    def __init__(
        self,
        dataset: Any,
        mapper: Mapper,
        groups: GroupSampler,
        bad_images: BadImages,
        *,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self.bad_images = bad_images
        self.pin_memory = pin_memory
        self._dataset = dataset
        self._mapper = mapper
        self._groups = groups
        self._cursor = Cursor()
        self._num_workers = num_workers
        self._kwargs = kwargs
        self._deaths: Counter[int] = Counter()  # of workers, by the image that they were at

    def __iter__(self) -> Iterator[list[Record]]:
        """The batches from where the loader stands.

        Raises:
            UserError: there were too many bad images in the batches before.
        """
        self.bad_images.check()
        while True:
            start = self._cursor
            at = torch.zeros(self._num_workers, 2, dtype=torch.int64)
            groups: deque[tuple[int, Cursor]] = deque()  # read ahead: size, and the place after it
            others = set(multiprocessing.active_children())
            samples = self._load(at.share_memory_() if self._num_workers else at, groups)
            workers = set(multiprocessing.active_children()) - others
            try:
                yield from self._batches(samples, groups)
            except (RuntimeError, OSError, EOFError):
                dead = _dead(workers)
                if not dead:
                    raise
            del samples  # with the workers that live
            for worker in dead:
                self._bury(worker, at)
            if self._cursor == start:  # or it might go on like this
                self.bad_images.check()

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on after the batch that was given out last."""
        return {
            "seed": self._groups.seed,
            "position": self._cursor.position,
            "waiting": list(self._cursor.waiting),
            "size": len(self._dataset),
            "bad_images": dict(self.bad_images.found),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["size"] != len(self._dataset):
            logger.warning(
                "The training set had %d images and now has %d: their order is another",
                state["size"],
                len(self._dataset),
            )
        self._groups.seed = state["seed"]
        self._cursor = Cursor(state["position"], tuple(state["waiting"]))
        self.bad_images.found = state["bad_images"] | self.bad_images.found

    def _load(self, at: Tensor, ahead: deque[tuple[int, Cursor]]) -> Iterator[Any]:
        """Start loading the samples, one after the other, and note their groups in ``ahead``."""

        def samples() -> Iterator[Sample]:
            for group, cursor in self._groups.after(self._cursor):
                ahead.append((len(group), cursor))
                yield from group

        tried_enough = {index for index, count in self._deaths.items() if count >= DEATHS}
        loaded = iter(
            torchdata.DataLoader(
                _Samples(
                    self._dataset,
                    self._mapper,
                    self._groups,
                    tried_enough,
                    self.bad_images.limit,
                    at,
                ),
                sampler=samples(),
                batch_size=None,
                num_workers=self._num_workers,
                pin_memory=bool(self.pin_memory),
                collate_fn=_as_it_is,
                worker_init_fn=_take_signals,
                generator=torch.Generator(),  # or it would draw from the training's
                **self._kwargs,
            )
        )
        if self._num_workers and threading.current_thread() is threading.main_thread():
            # PyTorch's handler raises a worker's death wherever the training is just then.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return loaded

    def _batches(
        self, samples: Iterator[Any], ahead: deque[tuple[int, Cursor]]
    ) -> Iterator[list[Record]]:
        batch: list[Record] = []
        for loaded in samples:
            for file_name, reason in loaded.problems:
                self.bad_images.add(file_name, reason)
            if loaded.record is None:
                self.bad_images.check()
            batch.append(loaded.record)
            size, cursor = ahead[0]
            if len(batch) == size:
                ahead.popleft()
                self._cursor = cursor
                yield batch
                self.bad_images.check()  # a trainer may have stopped in a better way
                batch = []

    def _bury(self, worker: BaseProcess, at: Tensor) -> None:
        """Count the death of a worker."""
        indices = [index - 1 for pid, index in at.tolist() if pid == worker.pid and index]
        code = worker.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        logger.warning("A data loader worker %s: starting the workers anew", how)
        if worker.exitcode == -signal.SIGTERM:
            return  # it was told to, and no image is to blame
        if not indices:
            self.bad_images.add(f"worker {worker.pid}", f"a data loader worker {how}, at no image")
        for index in indices:
            self._deaths[index] += 1
            name = _name(self._dataset[index], index)
            self.bad_images.add(name, f"{name}: a data loader worker {how} while it was loading it")


@dataclass(frozen=True)
class _Loaded:
    """A mapped record, and of which images something was wrong on the way, and what.

    There is no record where that was too much.
    """

    record: Record | None
    problems: list[tuple[str, str]]

    def pin_memory(self) -> _Loaded:
        """What PyTorch's loader calls, which would not find the tensors of instances itself."""
        return _Loaded(pin(self.record), self.problems)


class _Samples(torchdata.Dataset):
    """From a sample to what is loaded for it."""

    def __init__(
        self,
        dataset: Any,
        mapper: Mapper,
        groups: GroupSampler,
        bad: set[int],
        limit: int,
        at: Tensor,
    ) -> None:
        self._dataset = dataset
        self._mapper = mapper
        self._groups = groups
        self._bad = bad
        self._limit = limit
        self._at = at

    def __getitem__(self, sample: Sample) -> _Loaded:
        problems: list[tuple[str, str]] = []
        for index in self._like(sample.index):
            if index in self._bad:
                continue
            self._note(index + 1)
            record = self._dataset[index]
            try:
                with seeded(self._groups.seed, sample.position):
                    mapped = self._mapper(record)
            except (UserError, OSError, SizeMismatchError) as error:
                name = _name(record, index)
                reason = str(error) if name in str(error) else f"{name}: {error}"
                problems.append((name, " ".join(reason.split())))
                if len(problems) > self._limit:
                    return _Loaded(None, problems)  # which stop the run
                continue
            if mapped is not None:  # a mapper may leave an image out
                self._note(0)
                return _Loaded(mapped, problems)
        last = f", the last: {problems[-1][1]}" if problems else ""
        raise UserError(f"no image of the training set can be used{last}")

    def _like(self, index: int) -> Iterator[int]:
        """An image and all others of its kind, in the order of the data set."""
        kinds = self._groups.kinds
        for i in itertools.chain(range(index, len(self._dataset)), range(index)):
            if kinds is None or kinds[i] == kinds[index]:
                yield i

    def _note(self, at: int) -> None:
        """Write down what this worker is at, for when it dies."""
        worker = torchdata.get_worker_info()
        if worker is not None:
            self._at[worker.id] = torch.tensor([os.getpid(), at])


def _dead(workers: set[BaseProcess]) -> list[BaseProcess]:
    """Those that have ended; of a worker's end one hears before it can be seen."""
    by_sentinel = {worker.sentinel: worker for worker in workers}
    return [by_sentinel[s] for s in wait(by_sentinel, timeout=1) if isinstance(s, int)]


def _kinds(dataset: Any) -> list[int]:
    try:
        return [0 if record["width"] > record["height"] else 1 for record in dataset]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the training set's records lack {error}, by which images are grouped; give them, or "
            "set dataloader.train.aspect_ratio_grouping=False"
        ) from error


def _without_empty_boxes(records: list[Record], bad_images: BadImages) -> list[Record]:
    """The records without annotations whose box has no area."""
    kept = []
    for i, record in enumerate(records):
        annotations = record.get("annotations", ())
        whole = [annotation for annotation in annotations if not _is_empty(annotation)]
        if len(whole) < len(annotations):
            name = _name(record, i)
            count = len(annotations) - len(whole)
            bad_images.add(name, f"{name}: left out {count} annotation(s) whose box has no area")
            record = record | {"annotations": whole}
        kept.append(record)
    return kept


def _is_empty(annotation: Record) -> bool:
    box, mode = annotation.get("bbox"), annotation.get("bbox_mode")
    if box is None or mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        return False
    if mode == BoxMode.XYXY_ABS:
        return box[2] <= box[0] or box[3] <= box[1]
    return box[2] <= 0 or box[3] <= 0


def _name(record: Record, index: int) -> str:
    return str(record.get("file_name", f"image {index}"))


def _as_it_is(value: Any) -> Any:
    return value


def _take_signals(worker_id: int) -> None:
    # Whoever stops a run may signal all its processes. A worker is not to end at a warning, and is
    # to end at SIGTERM, by which its own process ends it too.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
