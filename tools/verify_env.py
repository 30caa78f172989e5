#!/usr/bin/env python3
"""Verify the environment: versions, backends of the operators, and the small detector at work.

The exit code is 0 if all that is needed works, and else 1. The tool itself needs nothing but
Python, so that it can say what is missing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import pkgutil
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

OK, ABSENT, FAILED = "ok", "-", "FAIL"

PIP = "pip install {}"
NEEDED = {  # distribution: what to import of it, and how to get it
    "torch": ("torch", "see https://pytorch.org, or run make setup"),
    "torchvision": ("torchvision.ops", "install the release made for this torch"),
    "numpy": ("numpy", PIP.format("numpy")),
    "detectron2": (
        "detectron2._C",  # compiled against one release of torch
        "build it against this torch: pip install --no-build-isolation --force-reinstall "
        "--no-deps git+https://github.com/facebookresearch/detectron2.git",
    ),
    "fvcore": ("fvcore.common.checkpoint", PIP.format("fvcore")),
    "iopath": ("iopath.common.file_io", PIP.format("iopath")),
    "omegaconf": ("omegaconf", PIP.format("omegaconf")),
    "opencv-python-headless": ("cv2", PIP.format("opencv-python-headless")),
    "pycocotools": ("pycocotools.mask", PIP.format("--force-reinstall pycocotools")),
    "tqdm": ("tqdm", PIP.format("tqdm")),
}
OPTIONAL = ("triton", "mamba-ssm", "causal-conv1d", "tensorboard")  # the backends say what for
TOLERANCE = 1e-3  # of a result's largest number, in float32


class Row(NamedTuple):
    """A line of the table; the remedy is shown if it failed."""

    what: str
    state: str
    found: str
    remedy: str = ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # The package's own parser and errors may be what is broken.
    if unknown := parser.parse_known_args(argv)[1]:
        print(f"error: there is no argument {' '.join(unknown)}; see --help", file=sys.stderr)
        return 2
    failed = 0
    for row in rows():
        print(f"{row.what:<36} {row.state:<4}  {row.found}", flush=True)
        if row.state == FAILED:
            failed += 1
            print(f"{'':<36} {'':<4}  -> {row.remedy}", flush=True)
    print(f"\n{failed} of these must be mended" if failed else "\nall that is needed works")
    return 1 if failed else 0


def rows() -> Iterator[Row]:
    warnings.simplefilter("ignore")
    good = sys.version_info >= (3, 10)
    yield Row("Python", OK if good else FAILED, platform.python_version(), "use 3.10 or newer")
    broken = False
    for name, (module, remedy) in NEEDED.items():
        row = needed(name, module, remedy)
        broken |= row.state == FAILED
        yield row
        if name == "torch" and row.state == OK:
            yield from device_rows()
    for name in OPTIONAL:
        version = version_of(name)
        yield Row(name, OK if version else ABSENT, version or "not installed; not needed")
    if broken:
        return
    (row,) = attempt(
        "mamba_vision", package_row, "pip install --no-build-isolation . in the project"
    )
    yield row
    if row.state == FAILED:
        return
    yield from backend_rows()
    yield from attempt(
        "nano detector, forward and backward",
        detector_row,
        "if a backend above is at fault, choose another one by its variable; else report this",
    )


def attempt(what: str, check: Callable[[], str], remedy: str) -> Iterator[Row]:
    try:
        yield Row(what, OK, check())
    except Exception as error:  # whatever a broken installation raises
        yield Row(what, FAILED, line(error), remedy)


def needed(name: str, module: str, remedy: str) -> Row:
    if module == "cv2":  # there are several distributions of it
        name = next(filter(version_of, ("opencv-python", "opencv-contrib-python")), name)
    try:
        importlib.import_module(module)
    except Exception as error:  # ImportError, and what a library that does not fit raises
        return Row(name, FAILED, f"{version_of(name) or 'not installed'}: {line(error)}", remedy)
    return Row(name, OK, version_of(name) or "found")


def device_rows() -> Iterator[Row]:
    import torch

    if not torch.cuda.is_available():
        yield Row("CUDA", ABSENT, torch.version.cuda or "torch is built for the CPU alone")
        reason = "none found"
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            reason = "hidden by CUDA_VISIBLE_DEVICES"
        elif shutil.which("nvidia-smi"):
            reason = "there is a driver, but it may be too old for this torch"
        yield Row("GPU", ABSENT, f"{reason}; everything runs on the CPU")
        return
    yield Row("CUDA", OK, str(torch.version.cuda))
    yield Row("cuDNN", OK, str(torch.backends.cudnn.version()))
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        text = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}"
        yield from attempt(f"GPU {i}", lambda i=i, text=text: use_gpu(i, text), "see the CUDA row")


def use_gpu(index: int, text: str) -> str:
    import torch

    x = torch.ones(8, 8, device=f"cuda:{index}")
    assert (x @ x).sum().item() == 512, "it computes something wrong"
    return text


def package_row() -> str:
    import mamba_vision

    return f"{mamba_vision.__version__} in {mamba_vision.__path__[0]}"


def backend_rows() -> Iterator[Row]:
    """Each backend of each operator, on the device that a training would use."""
    import torch

    from mamba_vision.ops.benchmark_operators import OPERATORS, Shape

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = Shape(B=2, L=100, D=16, N=8)
    choosers = {chooser.operator: chooser for chooser in all_backends()}
    for title, operator in OPERATORS.items():
        torch.manual_seed(0)
        tensors = [x.to(device) for x in operator.draw(shape, torch.float32)]
        chooser, chosen = choosers.get(title), None
        if chooser is not None:
            try:
                chosen = chooser.name_for(None, *tensors, states=shape.N)
            except Exception as error:  # a backend asked for by the variable, and not to be had
                yield Row(title, FAILED, line(error), f"mend or unset {chooser.variable}")
        truth = results(operator.function, [x.double() for x in tensors], "reference")
        for name in operator.backends:
            what = f"{title}: {name}"
            if reason := operator.obstacle(name, tensors):
                yield Row(what, ABSENT, f"not on {device}: {reason}")
                continue
            mark = "chosen" if name == chosen else "can be used"
            try:
                worst = error_of(results(operator.function, tensors, name), truth)
                state = OK if worst < TOLERANCE else FAILED
                found = f"{mark} on {device}; largest error {worst:.0e}"
            except Exception as error:  # a kernel built for another GPU, and the like
                state, found = FAILED, f"{mark}, and fails: {line(error)}"
            remedy = "reinstall it"
            if chooser is not None:
                remedy += f", or set {chooser.variable} to another backend"
            yield Row(what, state, found, remedy)


def all_backends() -> Iterator[Any]:
    """The choosers of all operators that have several backends."""
    from mamba_vision import ops

    for module in pkgutil.iter_modules(ops.__path__):
        if module.ispkg:
            chooser = getattr(
                importlib.import_module(f"{ops.__name__}.{module.name}"), "BACKENDS", None
            )
            if chooser is not None:
                yield chooser


def results(function: Callable, tensors: list, backend: str) -> list:
    """The result of an operator and the gradients of its sum's square."""
    import torch

    inputs = [x.detach().requires_grad_() for x in tensors]
    y = function(*inputs, backend=backend)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]


def error_of(found: list, truth: list) -> float:
    """The largest error of all results, over the largest number of that result."""
    return max(
        ((x.double() - exact).abs().max() / exact.abs().max()).item()
        for x, exact in zip(found, truth)
    )


def detector_row() -> str:
    import torch
    from detectron2.structures import BitMasks, Boxes, Instances
    from detectron2.utils.events import EventStorage

    from mamba_vision import model_zoo

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_zoo.get("cascade_mask_rcnn_mamba_vision_nano_shapes", device=device)
    masks = torch.zeros(1, 128, 160, dtype=torch.bool)
    masks[:, 32:96, 40:104] = True
    target = Instances(
        (128, 160),
        gt_boxes=Boxes(torch.tensor([[40.0, 32.0, 104.0, 96.0]])),
        gt_classes=torch.tensor([1]),
        gt_masks=BitMasks(masks),
    )
    batch = [{"image": torch.rand(3, 128, 160) * 255, "instances": target}] * 2
    with EventStorage():
        loss = sum(model(batch).values())
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert torch.isfinite(loss), f"the loss is {loss.item()}"
    assert not without, f"no gradient reaches {', '.join(without[:3])}"
    with torch.inference_mode():
        found = model.eval()([{"image": batch[0]["image"], "height": 128, "width": 160}])
    assert found[0]["instances"].has("pred_masks"), "it makes no masks"
    return f"on {device}; the loss of random weights is {loss.item():.2f}"


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
