#!/usr/bin/env bash
# Make .venv with Python 3.12 or newer and install megatron-m1 into it, with the versions of constraints.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf 'bootstrap: %s\n' "$*" >&2; }

# Whether "$1" runs and is a Python that all dependencies have wheels for. pyenv's shims exist for versions that don't run.
is_new_enough() {
    "$1" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

find_python() {
    local name path
    for name in python3 python3.12 python3.13 python3.14 python; do
        while IFS= read -r path; do
            if is_new_enough "$path"; then echo "$path"; return; fi
        done < <(type -ap "$name" || true)
    done
    for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-4]*/bin/python; do
        if is_new_enough "$path"; then echo "$path"; return; fi
    done
    return 1
}

# Print the path of a uv that is there already.
find_uv() {
    local path
    for path in "$(command -v uv || true)" build/uv/bin/uv .venv/bin/uv; do
        if [ -n "$path" ] && [ -x "$path" ]; then echo "$path"; return; fi
    done
    return 1
}

# Let an older Python install uv, which can download a newer Python.
fetch_uv() {
    say "no Python 3.12 here; fetching uv, which can download one"
    mkdir -p build
    { python3 -m venv --clear build/uv && build/uv/bin/python -m pip install --quiet uv; } >&2
}

make_environment() {
    local python
    if python=$(find_python); then
        say "using $python ($("$python" -c 'import platform; print(platform.python_version())'))"
        rm -rf .venv
        if "$python" -m venv .venv >/dev/null 2>&1; then return; fi
        # Debian splits ensurepip off into python3-venv; pip or uv can do without it.
        rm -rf .venv
        if find_uv >/dev/null && "$(find_uv)" venv --quiet --python "$python" .venv; then return; fi
        rm -rf .venv
        if "$python" -m venv --without-pip .venv >/dev/null 2>&1 &&
            "$python" -m pip --python .venv/bin/python install --quiet pip >&2; then return; fi
        rm -rf .venv
        say "$python can't make a virtual environment: install its venv package (Debian: apt-get install python3-venv) or uv"
        exit 1
    fi
    rm -rf .venv
    find_uv >/dev/null || fetch_uv || true
    if find_uv >/dev/null && "$(find_uv)" venv --quiet --python 3.12 .venv; then return; fi
    say "no Python 3.12, 3.13 or 3.14 on PATH or under pyenv, and uv could not fetch one: install one of them"
    exit 1
}

if ! { [ -x .venv/bin/python ] && is_new_enough .venv/bin/python; }; then make_environment; fi

# uv installs in seconds what takes pip minutes. It reads no pip.conf: where packages come only from a mirror named there,
# pip itself takes over.
find_uv >/dev/null || .venv/bin/python -m pip install --quiet uv || say "uv can't be installed; going on with pip"
if uv=$(find_uv) && VIRTUAL_ENV="$PWD/.venv" "$uv" pip install --quiet -c constraints.txt -e '.[dev]'; then
    :
elif .venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'; then
    :
else
    say "the packages could not be installed; the lines above say which"
    exit 1
fi
touch .venv/.installed
say "done: .venv/bin/megatron-m1 --help"
