#!/usr/bin/env bash
# Tells each VM of a TPU slice of several hosts which process of the group it runs, and gives all of them one secret.
set -euo pipefail

if [[ $# -ne 2 ]]; then
    echo "usage: tpu/group.sh NAME ZONE    (after create.sh; then start jaxserve.service on every VM)" >&2
    exit 2
fi
name=$1 zone=$2 port=8476

mapfile -t addresses < <(gcloud compute tpus tpu-vm describe "$name" --zone "$zone" \
    --flatten 'networkEndpoints[]' --format 'value(networkEndpoints.ipAddress)')
key=$(openssl rand -hex 32)

for process in "${!addresses[@]}"; do
    options="--num-processes ${#addresses[@]} --process-id $process --coordinator ${addresses[0]}:$port"
    options+=" --group-key-file /etc/jaxserve/group-key"
    echo "$name, VM $process: $options"
    # The secret goes through standard input: arguments can be seen by others on the machine.
    gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker "$process" --command \
        "echo 'JAXSERVE_GROUP=$options' | sudo tee /etc/jaxserve/group >/dev/null &&
        sudo install -m 640 -g jaxserve /dev/stdin /etc/jaxserve/group-key" <<<"$key"
done
