#!/usr/bin/env bash
# Creates a TPU slice through Cloud TPU's queue and sets jaxserve up on each of its VMs.
set -euo pipefail

usage() {
    cat >&2 <<'TEXT'
usage: tpu/create.sh [--spot] [--print] NAME ZONE TYPE [FLAG ...]

  NAME     of the slice, and of the request for it
  ZONE     a zone that has such TPUs
  TYPE     v5litepod-N, v5p-N or v6e-N
  FLAG     more flags for `gcloud compute tpus queued-resources create`, such as --network or --reserved
  --spot   cheaper, and may be taken away at any time
  --print  prints the commands instead of running them

The slice is the project's that gcloud is configured for, and costs money until `gcloud compute tpus queued-resources delete`.
TEXT
    exit 2
}

spot=() print=false
while [[ ${1-} == --* ]]; do
    case $1 in
        --spot) spot=(--spot) ;;
        --print) print=true ;;
        *) usage ;;
    esac
    shift
done
[[ $# -ge 3 ]] || usage
name=$1 zone=$2 type=$3
shift 3

case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) echo "error: unknown TPU type '$type'; give v5litepod-N, v5p-N or v6e-N (tpu7x: see gke/)" >&2 && exit 2 ;;
esac

run() {
    if $print; then
        printf '%q ' "$@" && echo
    else
        "$@"
    fi
}

wait_until_active() {
    local state
    until [[ ${state-} == ACTIVE ]]; do
        state=$(gcloud compute tpus queued-resources describe "$name" --zone "$zone" --format 'value(state.state)')
        echo "$name: $state"
        case $state in
            ACTIVE) ;;
            FAILED | SUSPENDED | SUSPENDING) echo "error: see gcloud compute tpus queued-resources describe $name --zone $zone" >&2 && exit 1 ;;
            *) sleep 20 ;;
        esac
    done
}

source=$(cd "$(dirname "$0")/.." && pwd)
archive=$(mktemp --suffix .tar.gz)
trap 'rm -f "$archive"' EXIT

run gcloud compute tpus queued-resources create "$name" --node-id "$name" --zone "$zone" \
    --accelerator-type "$type" --runtime-version "$runtime" "${spot[@]}" "$@"
$print || wait_until_active
run git -C "$source" archive --format tar.gz --output "$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name:jaxserve.tar.gz" --zone "$zone" --worker all
run gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command \
    'rm -rf jaxserve && mkdir jaxserve && tar -xzf jaxserve.tar.gz -C jaxserve && sudo jaxserve/tpu/setup.sh'
