#!/bin/sh
# bash tests/cuda_acceptance.sh [minutes]: what only a GPU can show; see the program that it starts.
exec "${PYTHON:-python3}" "$(dirname "$0")/experiments/cuda_acceptance.py" "$@"
