#!/bin/sh
# Make the virtual environment that the Makefile works in. Steps that are done are not done again.
#
# Reads from the environment, where the Makefile's variables of the same names arrive:
#   VENV        the environment's folder, made if missing (.venv)
#   PYTHON      the interpreter to make it with (the first CPython >= 3.10 on PATH)
#   TORCH       words for `pip install` (the pins in requirements.txt); empty: the environment's own
#   DETECTRON2  a path, wheel or URL (the pin in requirements.txt); empty: the environment's own
set -eu
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
TORCH=${TORCH-$(grep '^torch' requirements.txt | tr '\n' ' ')}
DETECTRON2=${DETECTRON2-$(grep '^detectron2' requirements.txt)}
python=$VENV/bin/python
stamps=$VENV/.setup
log=$stamps/pip.log

fail() {
    printf '\nSet-up stopped: %s\n' "$*" >&2
    exit 1
}

done_with() { # STEP KEY: whether the step was completed with that key
    [ "$(cat "$stamps/$1" 2>/dev/null)" = "$2" ]
}

once() { # STEP KEY COMMAND...
    step=$1 key=$2
    shift 2
    done_with "$step" "$key" && return
    rm -f "$stamps/$step"
    "$@"
    printf '%s\n' "$key" >"$stamps/$step"
}

is_supported() { # PYTHON
    "$1" -c 'import sys; sys.exit(sys.implementation.name != "cpython" or sys.version_info < (3, 10))' \
        2>/dev/null
}

version_of() { # PYTHON
    "$1" --version 2>&1 | head -n 1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null ||
            fail "PYTHON=$PYTHON is not a program. Name a CPython 3.10 or newer, for example" \
                "\`make PYTHON=python3.12 setup\`."
        is_supported "$PYTHON" ||
            fail "CPython 3.10 or newer is needed, and PYTHON=$PYTHON --version" \
                "answers '$(version_of "$PYTHON")'. Name another, for example \`make PYTHON=python3.12 setup\`."
        return
    fi
    for PYTHON in python3 python3.13 python3.12 python3.11 python3.10; do
        is_supported "$PYTHON" && return
    done
    fail "no CPython 3.10 or newer is on PATH. Install one (on Debian and Ubuntu: apt-get install" \
        "python3 python3-venv python3-dev) or name one: \`make PYTHON=/path/to/python3 setup\`."
}

make_venv() {
    [ ! -e "$VENV" ] || [ -e "$VENV/pyvenv.cfg" ] || [ -z "$(ls -A "$VENV")" ] ||
        fail "VENV=$VENV is there already and is no virtual environment. Name another folder:" \
            "\`make VENV=.venv setup\`."
    find_python
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$PYTHON cannot make virtual environments: its module venv or ensurepip is missing." \
            "Install it (on Debian and Ubuntu: apt-get install python3-venv) or name another" \
            "interpreter: \`make PYTHON=python3.12 setup\`."
    "$PYTHON" -m venv "$VENV" ||
        fail "the virtual environment $VENV could not be made; the reason is above. Free or choose" \
            "a folder that can be written (VENV=...) and run the same command again."
}

# What Detectron2's build needs, asked for before anything large is downloaded.
check_build_tools() { # PYTHON
    case $DETECTRON2 in
    '' | *.whl) return 0 ;;
    *git+*) command -v git >/dev/null ||
        fail "git is missing, and Detectron2 comes from a Git repository. Install git, or give a" \
            "copy that you have: \`make DETECTRON2=/path/to/folder-or-wheel setup\`." ;;
    esac
    for tool in "${CC:-gcc}" "${CXX:-g++}"; do
        command -v "${tool%% *}" >/dev/null ||
            fail "the compiler $tool is missing, and Detectron2 is built from source. Install gcc and" \
                "g++ (on Debian and Ubuntu: apt-get install build-essential), or give a wheel built" \
                "for your torch: \`make DETECTRON2=/path/to/detectron2.whl setup\`."
    done
    "$1" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
        fail "the C headers of $1 (Python.h) are missing, and Detectron2 is built from source. Install" \
            "them (on Debian and Ubuntu: apt-get install python3-dev) or name another interpreter:" \
            "\`make PYTHON=python3.12 setup\`."
}

pip_install() { # WHAT ARGUMENT...
    what=$1
    shift
    : >"$log"
    "$python" -m pip --disable-pip-version-check --log "$log" install "$@" || explain
}

explain() {
    again="Then run the same command again; what is installed already is kept. Log: $log."
    if grep -q 'No space left on device' "$log"; then
        fail "$what could not be installed: the disk is full. Free about 10 GB under $VENV and TMPDIR." \
            "$again"
    elif grep -Eiq 'connection (broken|refused|reset)|connect(ion)? ?timeout|read ?timed? ?out|name resolution|could not resolve host|unable to access|unreachable|ProxyError|SSLError|NewConnectionError' "$log"; then
        fail "$what could not be downloaded: the package index or the Git server does not answer." \
            "Check the network (HTTPS_PROXY, PIP_INDEX_URL), or bring copies: a folder of wheels" \
            "(PIP_FIND_LINKS and PIP_NO_INDEX=1) and DETECTRON2=/path/to/folder-or-wheel. $again"
    elif grep -q 'No matching distribution found' "$log"; then
        fail "the package index has no $what for $(version_of "$python") on $(uname -sm). Use an" \
            "interpreter it is built for (\`rm -r $VENV; make PYTHON=python3.12 setup\`), another index" \
            "(PIP_INDEX_URL) or another release (TORCH='torch>=2.4 torchvision'). $again"
    fi
    fail "$what could not be installed; pip's last error is above. Put right what it names, or give" \
        "another release or a copy that you have (TORCH=..., DETECTRON2=...). $again"
}

require_own() { # VARIABLE MODULE
    "$python" -c "import $2" ||
        fail "$1 is empty, so $2 has to be in $VENV, and it cannot be imported from there." \
            "Install it there, or leave $1 out to get the tested version."
}

install_torch() {
    if [ -z "$TORCH" ]; then
        require_own TORCH torchvision
    else
        # shellcheck disable=SC2086 # the words of TORCH are separate arguments
        pip_install "$(echo $TORCH)" $TORCH
    fi
}

# No wheel from pip's cache: it may be built against another torch. No CUDA in the build: nothing
# here uses Detectron2's CUDA kernels, and nvcc seldom matches the CUDA that torch was built with.
install_detectron2() {
    if [ -z "$DETECTRON2" ]; then
        require_own DETECTRON2 detectron2
    else
        CUDA_VISIBLE_DEVICES='' pip_install "Detectron2" --no-build-isolation --no-cache-dir --no-deps \
            --force-reinstall "$DETECTRON2"
        pip_install "what Detectron2 requires" --no-build-isolation detectron2
    fi
}

install_package() {
    pip_install "this package" --no-build-isolation --editable '.[dev]'
    "$python" -c 'import torchvision, detectron2, mamba_vision' ||
        fail "everything is installed, but cannot be imported; the reason is above. Mend or remove" \
            "$VENV, and run the same command again."
}

# Everything but torch and Detectron2, which may be the user's.
tools=$(sed -E '/^(#|$|torch|detectron2)/d' requirements.txt | tr '\n' ' ')
package="$(cat requirements.txt setup.py pyproject.toml | cksum) $TORCH $DETECTRON2"
done_with package "$package" && exit

if "$python" -m pip --version >/dev/null 2>&1; then
    is_supported "$python" ||
        fail "VENV=$VENV holds $(version_of "$python"), and CPython 3.10 or newer is needed. Remove" \
            "that folder or name another: \`make VENV=.venv-new setup\`."
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$python")" ] ||
        fail "PYTHON=$PYTHON is '$(version_of "$PYTHON")', but VENV=$VENV was made with" \
            "$(version_of "$python"). Remove that folder or name another: \`make VENV=.venv-new setup\`."
    PYTHON=$python
else
    find_python
fi
done_with detectron2 "$TORCH $DETECTRON2" || check_build_tools "$PYTHON"
[ "$PYTHON" = "$python" ] || make_venv
mkdir -p "$stamps"

# shellcheck disable=SC2086
once tools "$tools" pip_install "${tools% }" $tools
once torch "$TORCH" install_torch
once detectron2 "$TORCH $DETECTRON2" install_detectron2
once package "$package" install_package
echo "set-up complete: $VENV"
