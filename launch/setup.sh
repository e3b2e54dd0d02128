#!/usr/bin/env bash
# Make the virtual environment that the other scripts use, and print the path of its Python. Quick once it is there.
#
#   python=$(bash launch/setup.sh [test])      with `test`, what the tests need is installed too
#
# What you may adapt, by setting variables:
#   DIST_MNIST_VENV     the environment (default: .venv in the repository)
#   DIST_MNIST_PYTHON   a Python >= 3.11 to make it with (default: python3.14, 3.13, 3.12, 3.11 or python3)
#   DIST_MNIST_HASHES   no: take packages whose hashes are not in hashes.txt, such as an index of your own may hold
#   PIP_INDEX_URL, ...  pip's own variables and configuration hold. From the default index, torch for Linux comes with
#                       CUDA, which is gigabytes. Without a GPU, take the small build; the same pin allows it, and pip
#                       prefers it: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash launch/local.sh
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${DIST_MNIST_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
python=$venv/bin/python
constraints=$root/launch/constraints.txt
hashes=("$root/launch/hashes.txt")
stamp=$venv/.dist-mnist-installed # says what a complete installation was made from
extra=${1:-}

case $extra in
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
    '') ;;
    test) hashes+=("$root/launch/hashes-test.txt") ;;
    *) echo "error: setup.sh takes nothing, or test; $extra was given" >&2 && exit 2 ;;
esac

export PIP_USER=no # some systems' configuration says yes, with which pip refuses to install into an environment
unset PIP_TARGET PIP_PREFIX PIP_ROOT # nor anywhere else

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }
quietly() { # shows a command's output only if it fails
    local output; output=$("$@" 2>&1) || { say "$output"; fail "the set-up of $venv failed (see above): $*"; }
}

find_python() { # prints the first Python that is new enough and able to make environments
    local name found="" names=(python3.14 python3.13 python3.12 python3.11 python3)
    [[ -z ${DIST_MNIST_PYTHON:-} ]] || names=("$DIST_MNIST_PYTHON")
    for name in "${names[@]}"; do
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' &>/dev/null || continue
        if "$name" -c 'import ensurepip, venv' &>/dev/null; then echo "$name" && return; fi
        found=$name
    done
    [[ -z $found ]] || fail "$found lacks venv or ensurepip: install it (Debian, Ubuntu: apt-get install python3-venv)"
    fail "Python 3.11 or newer is needed, and not found as ${names[*]}: install it, or name it in DIST_MNIST_PYTHON"
}

may_install_venv() { [[ $extra == test && ${CI:-} == true && $EUID == 0 ]] && command -v apt-get >/dev/null; }
install_venv() { say "Installing it"; quietly apt-get update -qq; quietly apt-get install -qqy python3 python3-venv; }

fingerprint() { # by the environment's own Python, so that one that is broken or another version shows
    "$python" -ISc 'import hashlib, sys
made_from = [sys.version, *sys.argv[1:3], *(open(path).read() for path in sys.argv[3:])]
print(hashlib.sha256(repr(made_from).encode()).hexdigest())' "$root" "${DIST_MNIST_HASHES:-}" "$root/pyproject.toml" "$constraints" "$root"/launch/hashes*.txt
}
is_ready() { # the installation for the tests serves everything
    [[ -f $stamp ]] && [[ $(<"$stamp") == "$(fingerprint 2>/dev/null || echo broken)["*"$extra]" ]]
}

install_apart() { # the packages of one list, into a folder: torchvision of another build than torch breaks whatever finds
    # it, and not all that MLflow asks for goes with the pins
    local list=$root/launch/hashes-$1.txt packages=(--require-hashes --requirement "$root/launch/hashes-$1.txt")
    [[ ${DIST_MNIST_HASHES:-} != no ]] || mapfile -t packages < <(sed -n '/^[^ #].*==/s/ .*//p' "$list")
    quietly "$python" -m pip install --quiet --no-compile --no-deps --upgrade --target "$venv/$1" "${packages[@]}"
}

install() {
    say "Installing into $venv (once; torch is large) ..."
    rm -f "$stamp" # an interrupted installation leaves none
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
    "$python" -m compileall -q -j 0 "$venv"/lib &>/dev/null || true # on all cores; some packages hold what cannot be
    printf '%s\n' "$(fingerprint)[$extra]" >"$stamp.new" && mv "$stamp.new" "$stamp"
}

if ! is_ready; then
    mkdir -p "$venv"
    if command -v flock >/dev/null; then # one set-up at a time; the lock goes when this process ends, however it ends
        exec 9>"$venv/.dist-mnist-lock"
        flock -n 9 || case $? in
            1) say "Waiting for another set-up of $venv ..." && flock 9 ;;
            *) say "The file system of $venv has no locks (see above): let only one set-up run at a time" ;;
        esac
    fi
    is_ready || install
fi
echo "$python"
