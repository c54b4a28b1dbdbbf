"""What start-up says of an engine: the model, the devices, and what the KV pool holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxserve.config import GIB
from jaxserve.models.loading import ModelDescription
from jaxserve.pool_size import state_bytes, tokens_held

if TYPE_CHECKING:
    from jaxserve.build import Build


def summary_of(build: Build, num_programs: int) -> dict[str, str]:
    """Names and texts, in the order in which they are shown."""
    config, mesh = build.config, build.shardings.mesh
    tokens, holds = tokens_held(build), build.num_pages * build.page_size
    assert config.model.max_model_len is not None
    states = {
        "recurrent states": f"{config.scheduler.max_num_seqs} requests, {state_bytes(build) / GIB:.2f} GiB a device",
        "prefix cache": "off: this model keeps a recurrent state, which pages do not hold",
    }
    return {
        "model": f"{config.model.model} ({build.model.name}, {sum(w.size for w in build.model.abstract) / 1e6:,.0f} M parameters)",
        "dtype": build.dtype.name + _matmuls(build.model),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "attention": _attention(build),
        "mesh": ", ".join(f"{name}={size}" for name, size in mesh.shape.items()),
        "KV pool": f"{build.num_pages:,} pages of {build.page_size} tokens"
        f"{f' = {tokens:,} tokens' if tokens == holds else f', {tokens:,} tokens in requests of the full length'}, "
        f"{build.num_pages * build.page_bytes / GIB:.2f} GiB a device, {build.kv_dtype.name}",
        **({"page tables": str(build.layout)} if build.layout.num_tables > 1 else {}),
        "max concurrency": f"{config.scheduler.max_num_seqs} requests; {tokens / config.model.max_model_len:.1f} "
        f"of the full {config.model.max_model_len:,} tokens",
        **(states if build.has_states else {}),
        "programs": str(num_programs),
    }


def _attention(build: Build) -> str:
    if build.runtime.attention != "xla":
        return "by kernels"
    return "by XLA loops" + (
        ": jaxserve has kernels for H100 and H200, not for this GPU" if build.runtime.platform == "gpu" else ""
    )


def _matmuls(model: ModelDescription) -> str:
    """How many of the layers' matmuls are in 8 bits."""
    forms = [parameter.is_quantized for parameter in model.parameters if parameter.contract is not None]
    return f", {sum(forms)} of {len(forms)} matmuls with weights of 8 bits" if any(forms) else ""
