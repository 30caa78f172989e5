"""Packaging of ``mamba_vision``; `make setup` and README.md say how to install it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
SOURCE = "projects/MambaVision"
PACKAGE = ROOT / SOURCE / "mamba_vision"

if not (PACKAGE / "configs" / "common").is_dir():
    raise SystemExit(
        f"error: {PACKAGE / 'configs'} is not a link to the folder configs: this copy was made "
        "without symbolic links; clone again with `git clone -c core.symlinks=true`"
    )

version = re.search(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
assert version is not None

setup(
    name="mamba-vision-detectron2",
    version=version[1],
    description="MambaVision backbones and their Cascade Mask R-CNN for Detectron2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(SOURCE),
    package_dir={"": SOURCE},
    package_data={"mamba_vision": ["configs/**/*.py"]},
    # Detectron2 is needed too. It is not on PyPI and its setup imports torch, so no requirement
    # written here could install it: requirements.txt names the tested commit.
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.7",
        "numpy>=1.24",
        "omegaconf>=2.1",
        "opencv-python-headless>=4.7",
        "pycocotools>=2.0.6",
        "setuptools<81",  # Detectron2's model zoo, which the configs read, imports pkg_resources
        "tqdm>=4.60",
    ],
    extras_require={
        "cuda": ["causal-conv1d>=1.4", "mamba-ssm>=2.2"],
        "dev": ["mypy>=1.11", "pytest>=8", "ruff>=0.9", "tensorboard", "wheel"],
    },
)
