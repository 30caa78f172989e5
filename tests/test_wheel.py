"""What is installed: a wheel that holds every config, and a word when Detectron2 is missing."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from mamba_vision import model_zoo

ROOT = Path(__file__).parents[1]

LOAD_EVERY_CONFIG = """
import mamba_vision
from mamba_vision import model_zoo

print(mamba_vision.__file__)
for name in model_zoo.names():
    config = model_zoo.get_config(name)
    assert {"model", "dataloader", "optimizer", "lr_multiplier", "train"} <= config.keys(), name
    print(name)
"""


def run(*command, cwd, **variables):
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build_wheel(source, folder):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--wheel-dir", folder, ".", cwd=source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.startswith("mamba_vision/")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy, links kept, so that neither old build folders nor this checkout are touched."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, copy)
    for name in ("configs", "projects"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


def test_holds_every_source_file(wheel):
    package = ROOT / "projects" / "MambaVision"
    modules = {str(p.relative_to(package)) for p in package.glob("mamba_vision/**/*.py")}
    configs = {f"mamba_vision/{p.relative_to(ROOT)}" for p in ROOT.glob("configs/**/*.py")}
    assert contents(wheel) == modules | configs


def test_works_away_from_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site]
    run(*pip, wheel, cwd=tmp_path)
    said = run(sys.executable, "-c", LOAD_EVERY_CONFIG, cwd=tmp_path, PYTHONPATH=str(site))
    imported, *names = said.splitlines()
    assert imported == str(site / "mamba_vision" / "__init__.py")
    assert names == model_zoo.names()


def test_source_distribution_makes_the_same_wheel(wheel, checkout, tmp_path):
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=checkout)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path)
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    assert contents(build_wheel(source, tmp_path)) == contents(wheel)


def test_without_detectron2_the_import_says_how_to_install_it():
    code = "import sys; sys.modules['detectron2'] = None; import mamba_vision"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install --no-build-isolation git+https://" in result.stderr.splitlines()[-1]
