#!/bin/sh
# bash tests/cuda_acceptance.sh [minutes]: what only a GPU can show; see the program that it starts.
# PYTHON names another interpreter than python3.
exec "${PYTHON:-python3}" "$(dirname "$0")/experiments/cuda_acceptance.py" "$@"
