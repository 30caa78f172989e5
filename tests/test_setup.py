"""Set-up (tools/setup.sh): what it does, that it does it once, and how it ends when it cannot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SYSTEM_TOOLS = [
    *("cat", "cksum", "dirname", "grep", "head", "ls"),
    *("mkdir", "rm", "sed", "sh", "tr", "uname"),
]


def set_up(**variables):
    """Run set-up with these variables and none of the caller's own."""
    mine = {"VENV", "PYTHON", "TORCH", "DETECTRON2", "CC", "CXX"}
    inherited = {k: v for k, v in os.environ.items() if k not in mine and k[:4] != "PIP_"}
    return subprocess.run(
        [ROOT / "tools" / "setup.sh"],
        env=inherited | {k: str(v) for k, v in variables.items()},
        capture_output=True,
        text=True,
        timeout=120,
    )


def paragraph(result):
    """The one paragraph with which a set-up that failed ends."""
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.rstrip("\n").split("\n\n")[-1].strip()
    assert last.startswith("Set-up stopped: ")
    assert "\n" not in last
    return last


def script(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def python_with(path, statement):
    """An interpreter that runs ``statement`` before any ``-c`` code."""
    return script(
        path,
        f'[ "$1" = -c ] || exec "{sys.executable}" "$@"',
        f'exec "{sys.executable}" -c "{statement}; exec(\\"\\"\\"$2\\"\\"\\")"',
    )


@pytest.fixture
def path_with(tmp_path):
    """Make a PATH that leads to the system's tools that set-up uses and to the programs named."""

    def make(*programs):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in [*SYSTEM_TOOLS, *programs]:
            (folder / name).symlink_to(shutil.which(name))
        return folder

    return make


@pytest.fixture
def venv(tmp_path):
    """A stand-in for a virtual environment that notes what pip is told to install."""
    folder = tmp_path / "venv"
    script(
        folder / "bin" / "python",
        f'case "$*" in *" install "*) echo "${{*#* install }}" >>"{folder}/installed" ;; esac',
        '[ "$1" = -c ] && [ -n "${2##*import torch*}" ] || exit 0',
        f'exec "{sys.executable}" "$@"',
    )
    return folder


def installed(venv):
    """What pip was told to install since the last call."""
    note = venv / "installed"
    lines = note.read_text().splitlines() if note.exists() else []
    note.unlink(missing_ok=True)
    return lines


def test_steps_are_done_in_order_and_once(venv):
    assert set_up(VENV=venv).returncode == 0
    tools, torch, detectron2, its_requirements, package = installed(venv)
    assert "setuptools<81" in tools
    assert torch.split() == ["torch==2.11.0", "torchvision==0.26.0"]
    assert "--no-build-isolation" in detectron2
    assert "detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833" in detectron2
    assert its_requirements.split() == ["--no-build-isolation", "detectron2"]
    assert package.endswith("--editable .[dev]")

    assert set_up(VENV=venv).returncode == 0
    assert installed(venv) == []


def test_another_torch_builds_detectron2_again(venv):
    set_up(VENV=venv)
    installed(venv)
    assert set_up(VENV=venv, TORCH="torch==2.6.0 --index-url https://example.org").returncode == 0
    torch, detectron2, _, _ = installed(venv)
    assert torch.split() == ["torch==2.6.0", "--index-url", "https://example.org"]
    assert "detectron2.git" in detectron2


def test_a_step_that_failed_is_done_again(venv):
    python = venv / "bin" / "python"
    works = python.read_text()
    python.write_text(works.replace("\n", '\ncase "$*" in *detectron2.git*) exit 1 ;; esac\n', 1))
    assert "Detectron2 could not be installed" in paragraph(set_up(VENV=venv))
    installed(venv)
    python.write_text(works)
    assert set_up(VENV=venv).returncode == 0
    assert [line.split()[-1] for line in installed(venv)][-1] == ".[dev]"
    assert not (venv / "installed").exists()


def test_own_torch_and_detectron2_are_left_alone(venv, tmp_path):
    assert set_up(VENV=venv, TORCH="", DETECTRON2=tmp_path / "my build.whl").returncode == 0
    _, detectron2, _, _ = installed(venv)
    assert detectron2.endswith(str(tmp_path / "my build.whl"))
    assert set_up(VENV=venv, TORCH="", DETECTRON2="").returncode == 0
    (package,) = installed(venv)
    assert package.endswith(".[dev]")


def test_unsupported_python(tmp_path):
    python = python_with(tmp_path / "python3.8", "import sys; sys.version_info = (3, 8, 18)")
    said = paragraph(set_up(VENV=tmp_path / "venv", PYTHON=python))
    assert "CPython 3.10 or newer is needed" in said
    assert str(python) in said
    assert not (tmp_path / "venv").exists()


def test_no_python(tmp_path, path_with):
    said = paragraph(set_up(VENV=tmp_path / "venv", PATH=path_with()))
    assert "no CPython 3.10 or newer is on PATH" in said
    said = paragraph(set_up(VENV=tmp_path / "venv", PYTHON="no-such-python"))
    assert "PYTHON=no-such-python is not a program" in said


def test_another_python_than_the_environments(venv, tmp_path):
    other = script(tmp_path / "python3.99", "echo Python 3.99.0")
    said = paragraph(set_up(VENV=venv, PYTHON=other))
    assert "Python 3.99.0" in said
    assert f"VENV={venv}" in said
    assert installed(venv) == []


def test_no_venv_module(tmp_path):
    python = python_with(tmp_path / "python", "import sys; sys.modules['ensurepip'] = None")
    said = paragraph(set_up(VENV=tmp_path / "venv", PYTHON=python))
    assert "cannot make virtual environments" in said
    assert "python3-venv" in said


def test_no_headers(tmp_path):
    lie = "import sysconfig; sysconfig.get_paths = lambda: {'include': '/nowhere'}"
    said = paragraph(set_up(VENV=tmp_path / "venv", PYTHON=python_with(tmp_path / "python", lie)))
    assert "Python.h" in said
    assert "python3-dev" in said


@pytest.mark.parametrize(
    ("present", "missing"),
    [(["gcc", "g++"], "git"), (["git", "g++"], "gcc"), (["git", "gcc"], "g++")],
)
def test_no_build_tool(tmp_path, path_with, present, missing):
    path = path_with(*present)
    said = paragraph(set_up(VENV=tmp_path / "venv", PYTHON=sys.executable, PATH=path))
    assert f"{missing} is missing" in said
    assert "DETECTRON2=" in said
    assert not (tmp_path / "venv").exists()


def test_a_wheel_of_detectron2_needs_no_compiler(venv, path_with):
    result = set_up(VENV=venv, DETECTRON2="detectron2.whl", PATH=path_with())
    assert result.returncode == 0
    assert any(line.endswith("detectron2.whl") for line in installed(venv))


def test_a_folder_that_is_no_environment_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    said = paragraph(set_up(VENV=tmp_path, PYTHON=sys.executable))
    assert "is no virtual environment" in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_no_network(tmp_path):
    said = paragraph(
        set_up(
            VENV=tmp_path / "venv",
            PYTHON=sys.executable,
            PIP_CONFIG_FILE=os.devnull,
            PIP_INDEX_URL="http://127.0.0.1:9/simple",
            PIP_RETRIES="0",
            PIP_NO_CACHE_DIR="1",
        )
    )
    assert "does not answer" in said
    assert "PIP_INDEX_URL" in said


def test_nothing_for_this_python(tmp_path):
    said = paragraph(
        set_up(
            VENV=tmp_path / "venv", PYTHON=sys.executable, PIP_NO_INDEX="1", PIP_FIND_LINKS=tmp_path
        )
    )
    assert "the package index has no" in said
    assert "Python 3" in said
