#!/usr/bin/env bash
# Create the virtual environment of the other scripts, and print the path of its Python. Fast if it already exists.
#
#   python=$(bash launch/setup.sh [test])      `test` also installs what the tests need
#
# What you may adapt, by environment variables:
#   DIST_MNIST_VENV     virtual environment (default: .venv in the repository)
#   DIST_MNIST_PYTHON   Python >= 3.11 to create it with (default: python3.14, 3.13, 3.12, 3.11 or python3)
#   DIST_MNIST_HASHES   no: accept packages whose hashes are not in hashes.txt, for example from your own index
#   PIP_INDEX_URL, ...  pip's own variables and configuration apply. torch from the default index includes CUDA, which
#                       is gigabytes. Without a GPU, use the small build, which pip then prefers:
#                       PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash launch/local.sh
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${DIST_MNIST_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
python=$venv/bin/python
constraints=$root/launch/constraints.txt
hashes=("$root/launch/hashes.txt")
stamp=$venv/.dist-mnist-installed # marks a complete installation, with the fingerprint of its inputs
extra=${1:-}

case $extra in
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
    '') ;;
    test) hashes+=("$root/launch/hashes-test.txt") ;;
    *) echo "error: setup.sh expects no argument, or test, got $extra" >&2 && exit 2 ;;
esac

export PIP_USER=no # some systems set yes, which makes pip refuse to install into an environment
unset PIP_TARGET PIP_PREFIX PIP_ROOT # they would redirect the installation

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }
quietly() { # show a command's output only if it fails
    local output; output=$("$@" 2>&1) || { say "$output"; fail "setting up $venv failed (see above): $*"; }
}

find_python() { # print the first Python that is new enough and can create environments
    local name found="" names=(python3.14 python3.13 python3.12 python3.11 python3)
    [[ -z ${DIST_MNIST_PYTHON:-} ]] || names=("$DIST_MNIST_PYTHON")
    for name in "${names[@]}"; do
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' &>/dev/null || continue
        if "$name" -c 'import ensurepip, venv' &>/dev/null; then echo "$name" && return; fi
        found=$name
    done
    [[ -z $found ]] || fail "$found lacks venv or ensurepip: install it (Debian, Ubuntu: apt-get install python3-venv)"
    fail "Python 3.11 or newer is needed, but none of ${names[*]} is: install it, or set DIST_MNIST_PYTHON"
}

may_install_venv() { [[ $extra == test && ${CI:-} == true && $EUID == 0 ]] && command -v apt-get >/dev/null; }
install_venv() { say "Installing Python by apt-get"; quietly apt-get update -qq; quietly apt-get install -qqy python3 python3-venv; }

fingerprint() { # computed by the environment's Python, to detect a broken or different one
    "$python" -ISc 'import hashlib, sys
made_from = [sys.version, *sys.argv[1:3], *(open(path).read() for path in sys.argv[3:])]
print(hashlib.sha256(repr(made_from).encode()).hexdigest())' "$root" "${DIST_MNIST_HASHES:-}" "$root/pyproject.toml" "$constraints" "$root"/launch/hashes*.txt
}
is_ready() { # an installation for tests also serves everything else
    [[ -f $stamp ]] && [[ $(<"$stamp") == "$(fingerprint 2>/dev/null || echo broken)["*"$extra]" ]]
}

install_apart() { # install the packages of one list into a folder: a torchvision of another build than torch breaks
    # whatever imports it, and some requirements of MLflow conflict with the pins
    local list=$root/launch/hashes-$1.txt packages=(--require-hashes --requirement "$root/launch/hashes-$1.txt")
    [[ ${DIST_MNIST_HASHES:-} != no ]] || mapfile -t packages < <(sed -n '/^[^ #].*==/s/ .*//p' "$list")
    quietly "$python" -m pip install --quiet --no-compile --no-deps --upgrade --target "$venv/$1" "${packages[@]}"
}

install() {
    say "Installing into $venv (once; torch is large) ..."
    rm -f "$stamp" # an interrupted installation must not leave one
    if ! "$python" -c '' 2>/dev/null; then
        local base; base=$(find_python) || { may_install_venv && install_venv && base=$(find_python); } || exit 1
        [[ ! -f $venv/pyvenv.cfg ]] || rm -rf "${venv:?}"/{bin,include,lib,lib64} # useless without a Python that runs
        quietly "$base" -m venv "$venv"
    elif ! "$python" -m pip --version &>/dev/null; then
        quietly "$python" -m ensurepip
    fi
    local hashed=() options=(--quiet --no-compile)
    if [[ ${DIST_MNIST_HASHES:-} != no ]]; then
        for file in "${hashes[@]}"; do hashed+=(--requirement "$file"); done
        quietly "$python" -m pip install --quiet --no-compile --require-hashes --no-deps "${hashed[@]}"
        options+=(--no-build-isolation) # with setuptools from there
    fi
    quietly "$python" -m pip install "${options[@]}" --constraint "$constraints" --editable "$root${extra:+[$extra]}"
    [[ $extra != test ]] || { install_apart networks && install_apart trackers; }
    "$python" -m compileall -q -j 0 "$venv"/lib &>/dev/null || true # on all cores; some packages have invalid files
    printf '%s\n' "$(fingerprint)[$extra]" >"$stamp.new" && mv "$stamp.new" "$stamp"
}

if ! is_ready; then
    mkdir -p "$venv"
    [[ -w $venv ]] || fail "$venv is not ready, and you cannot write to it. Its owner has to run launch/setup.sh after" \
        "each update, with a DIST_MNIST_PYTHON that all users can run; or set DIST_MNIST_VENV to a folder of yours"
    if command -v flock >/dev/null; then # one set-up at a time; the lock is released when this process ends
        exec 9>"$venv/.dist-mnist-lock"
        flock -n 9 || case $? in
            1) say "Waiting for another set-up of $venv ..." && flock 9 ;;
            *) say "The file system of $venv has no locks (see above): run only one set-up at a time" ;;
        esac
    fi
    is_ready || install
fi
echo "$python"
