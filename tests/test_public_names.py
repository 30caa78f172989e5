import subprocess
import sys

import pytest

import mamba_vision


@pytest.mark.parametrize("name", mamba_vision.__all__)
def test_public_name_is_there(name):
    assert getattr(mamba_vision, name) is not None
    assert name in dir(mamba_vision)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mamba_vision.nothing  # noqa: B018


def test_importing_the_package_imports_no_framework():
    code = "import sys, mamba_vision; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": _root()})


def _root() -> str:
    return str(next(iter(mamba_vision.__path__)) + "/..")
