#!/usr/bin/env bash
# Runs on the GPU machine: each argument is MODEL:CASE,CASE,...; results go to $OUT.
set -u
export PYTHONPATH=. XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 TF_CPP_MIN_LOG_LEVEL=2
for job in "$@"; do
  model=${job%%:*} cases=${job#*:}
  timeout "${LIMIT:-280}" python -m jaxserve.cli bench offline "bench/models/$model" --cases bench/cases.json --only "$cases" --output "$OUT/$model.json" ${OPTIONS:-} 2>&1 | tail -40
done
