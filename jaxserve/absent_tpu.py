"""Keeps libtpu quiet on machines that have no TPU, where it is only there to compile for one."""

from __future__ import annotations

import os
from glob import glob

# libtpu looks for these at Google's metadata server, and prints errors, or waits, where there is none.
_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # processes that only compile need not wait for each other
}


def quiet_libtpu() -> None:
    """To be called before jax looks for devices. Does nothing where there may be a TPU."""
    if not glob("/dev/accel*") and not glob("/dev/vfio/[0-9]*"):
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
