#!/usr/bin/env bash
# Installs this checkout on a TPU VM as a new release, beside those that are there, and the systemd unit. Starts nothing.
set -euo pipefail

if [[ $# -gt 0 || $EUID -ne 0 ]]; then
    echo "usage: sudo tpu/setup.sh    (on the TPU VM, as root; run it again to install a newer checkout)" >&2
    exit 2
fi
source=$(cd "$(dirname "$0")/.." && pwd)
home=/opt/jaxserve
release=$home/releases/$(date -u +%Y%m%dT%H%M%SZ)

# The TPU images of v5 and v6e have Python 3.10; uv fetches a newer one, for which nothing else has to change.
if python=$(command -v python3.13 || command -v python3.12) && "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv "$release"
else
    mkdir -p "$home/uv"
    python3 -m pip install --quiet --target "$home/uv" uv
    UV_PYTHON_INSTALL_DIR=$home/python "$home/uv/bin/uv" venv --quiet --seed --python 3.12 "$release"
fi
"$release/bin/python" -m pip install --quiet --constraint "$source/constraints.txt" "${source}[tpu]"
"$release/bin/jaxserve" --version

id jaxserve >/dev/null 2>&1 || useradd --system --home-dir /var/lib/jaxserve --shell /usr/sbin/nologin jaxserve
install -d -m 750 -o root -g jaxserve /etc/jaxserve
[[ -e /etc/jaxserve/serve.yaml ]] || install -m 640 -g jaxserve "$source/tpu/serve.yaml" /etc/jaxserve/serve.yaml
install -m 644 "$source/tpu/jaxserve.service" /etc/systemd/system/jaxserve.service
ln -sfn "$release" "$home/current"
systemctl daemon-reload

cat <<TEXT
installed $release
next: edit /etc/jaxserve/serve.yaml, then
  /opt/jaxserve/current/bin/jaxserve new-key NAME | sudo tee -a /etc/jaxserve/keys
  sudo systemctl enable --now jaxserve && journalctl --follow --unit jaxserve
TEXT
