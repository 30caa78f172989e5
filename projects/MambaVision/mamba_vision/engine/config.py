"""Configs from files and from the command line, every mistake named."""

from __future__ import annotations

import difflib
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import LazyConfig
from omegaconf import DictConfig

from .. import model_zoo
from ..errors import UserError
from .overrides import apply_overrides
from .own_data import register_data_sets

__all__ = ["find_config", "load_config"]

PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")


def find_config(name: str | Path) -> Path:
    """The config file that a user means.

    Args:
        name: path of a ``.py`` or ``.yaml`` LazyConfig file, or the name of one of the project's
            configs (:func:`mamba_vision.model_zoo.names`).

    Raises:
        UserError: there is no such file; the message names the nearest.
    """
    path = Path(name)
    if not str(name):
        raise UserError(f"no config: give --config-file FILE, or one of {_list(model_zoo.names())}")
    if path.is_file():
        if path.suffix not in (".py", ".yaml", ".yml"):
            raise UserError(f"config {path} is neither a .py nor a .yaml file; give a LazyConfig")
        return path
    if path.name == str(path) and path.name.removesuffix(".py") in model_zoo.names():
        return model_zoo.CONFIGS / f"{path.name.removesuffix('.py')}.py"
    there = [str(p) for p in path.parent.glob("*") if p.suffix in (".py", ".yaml", ".yml")]
    near = difflib.get_close_matches(str(path), [*there, *model_zoo.names()], n=1)
    reason = "is a folder" if path.is_dir() else "does not exist"
    remedy = f"did you mean {near[0]}?" if near else f"or name one of {_list(model_zoo.names())}"
    raise UserError(f"config {path} {reason}; {remedy}")


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Load a config and apply overrides to it.

    Args:
        name: as for :func:`find_config`.
        overrides: ``key=value`` texts, as for :func:`.overrides.apply_overrides`.

    Returns:
        A config with the keys ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and
        ``train``. The data sets that it lists under ``data_sets`` are registered.

    Raises:
        UserError: there is no such config, it cannot be run, lacks one of those keys, or an
            override cannot be applied.
    """
    path = find_config(name)
    try:
        with warnings.catch_warnings():
            # from Detectron2's model_zoo, which most configs import: nothing for a user to do
            warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
            config = LazyConfig.load(str(path))
    except UserError:
        raise
    except Exception as error:  # whatever the config's own code raises
        raise UserError(
            f"config {path} cannot be loaded{_line(error, path)}: {_first_line(error)}; mend it"
        ) from error
    lacking = [part for part in PARTS if part not in config]
    if lacking:
        raise UserError(
            f"config {path} does not define {_list(lacking)}; a LazyConfig defines {_list(PARTS)}"
        )
    apply_overrides(config, overrides)
    register_data_sets(config)
    return config


def _line(error: Exception, path: Path) -> str:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f" (line {lines[-1]})" if lines else ""


def _first_line(error: Exception) -> str:
    error = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error
    text = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
