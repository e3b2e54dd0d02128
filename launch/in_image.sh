#!/usr/bin/env bash
# Run dist-mnist in a container by Apptainer or Singularity, as slurm/*.sh do if DIST_MNIST_IMAGE is set.
#
#   DIST_MNIST_IMAGE=dist-mnist.sif bash launch/in_image.sh train [training options]
#
# The container sees this machine's GPUs, environment variables, home folder and working directory.
#
# What you may adapt, by environment variables:
#   DIST_MNIST_IMAGE  container image: a .sif file (built from launch/apptainer.def), or a name: docker://HOST/NAME
#   APPTAINER_BIND    other folders to mount in the container, such as /scratch (Singularity: SINGULARITY_BIND)
#   DIST_MNIST_DATA   data folder, also mounted in the container
set -euo pipefail

fail() { printf 'error: %s\n' "$*" >&2 && exit 2; }

case ${1:-} in
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
esac
[[ -n ${DIST_MNIST_IMAGE:-} ]] || fail "DIST_MNIST_IMAGE is not set to a container image; see --help"
runtime=$(command -v apptainer || command -v singularity) ||
    fail "DIST_MNIST_IMAGE is set, but neither apptainer nor singularity is installed on $HOSTNAME"
options=()
bind() {
    [[ $1 != *[:,]* ]] || fail "$1 cannot be mounted into the image: the path has a colon or comma; use another folder"
    options+=(--bind "$1")
}
bind "$PWD"
[[ -z ${DIST_MNIST_DATA:-} ]] || bind "$(realpath -m -- "$DIST_MNIST_DATA")"
[[ ! -e /dev/nvidiactl ]] || options+=(--nv)
unset PYTHONPATH PYTHONHOME # they belong to this machine's Python
exec "$runtime" exec "${options[@]}" "$DIST_MNIST_IMAGE" dist-mnist "$@"
