"""Tables of tensor names, made from the names of a model's modules. Defaults are those of Llama, which most families share."""

from __future__ import annotations

from typing import Literal

from jaxserve.models.families.assembly import Assembly, Halves, OneOf, Projection, Same, Stack
from jaxserve.models.families.moe_assembly import ExpertDown, ExpertUp, FusedDown, FusedUp
from jaxserve.models.families.qkv_assembly import HeadNorm, Qkv, QkvLayout

Table = dict[str, Assembly]
LAYER = "model.layers.{i}."


def tensors(
    *,
    layer: str = LAYER,
    embed: str = "model.embed_tokens",
    final_norm: str = "model.norm",
    lm_head: str = "lm_head",
    mixer_norm: str = "input_layernorm",
    mlp_norm: str = "post_attention_layernorm",
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    layout: QkvLayout = "apart",
    out: str = "self_attn.o_proj",
    q_norm: str = "self_attn.q_norm",
    k_norm: str = "self_attn.k_norm",
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj"),
    gate_up: str | None = None,
    down: str = "mlp.down_proj",
    is_transposed: bool = False,
) -> Table:
    """The table of a model with attention and plain or gated feed-forward blocks.

    Args:
        layer: prefix of a layer's modules; embed, final_norm and lm_head carry theirs.
        qkv: three modules, or one that holds all three as `layout` says.
        up: gate and up, or up alone.
        gate_up: the one module that holds both, instead of `up`.
        is_transposed: weights are stored [in, out] (GPT-2).
    """
    table: Table = {
        "embed": Same(f"{embed}.weight"),
        "layers.{i}.mixer.out": Projection(f"{layer}{out}.weight", is_transposed=is_transposed),
        "layers.{i}.mixer.out_bias": Same(f"{layer}{out}.bias"),
        "layers.{i}.mlp.down": Projection(f"{layer}{down}.weight", is_transposed=is_transposed),
        "layers.{i}.mlp.down_bias": Same(f"{layer}{down}.bias"),
        "lm_head": Projection(f"{lm_head}.weight"),
        "head_bias": Same(f"{lm_head}.bias"),
    }
    for ours, kind in (("", "weight"), ("_bias", "bias")):
        transposed = is_transposed and kind == "weight"
        table["layers.{i}.mixer.qkv" + ours] = Qkv(tuple(f"{layer}{name}.{kind}" for name in qkv), layout, transposed)
        table["layers.{i}.mlp.up" + ours] = (
            Stack(tuple(f"{layer}{name}.{kind}" for name in up), transposed)
            if gate_up is None
            else Halves(f"{layer}{gate_up}.{kind}")
        )
    norms = {"final_norm": final_norm, "layers.{i}.mixer_norm": layer + mixer_norm, "layers.{i}.mlp_norm": layer + mlp_norm}
    norms |= {"layers.{i}.mixer.q_norm": layer + q_norm, "layers.{i}.mixer.k_norm": layer + k_norm}
    return table | norm_tensors(norms)


def norm_tensors(norms: dict[str, str]) -> Table:
    """The gain and the bias of each norm, by our path and the checkpoint's module."""
    return {f"{ours}.{kind}": Same(f"{theirs}.{kind}") for ours, theirs in norms.items() for kind in ("weight", "bias")}


def layer_norms(**names: str) -> Table:
    """Norms of Llama-like layers: ours, such as mixer_out_norm, and the checkpoint's module."""
    return norm_tensors({f"layers.{{i}}.{ours}": LAYER + theirs for ours, theirs in names.items()})


def head_norms(q: str, k: str, form: Literal["heads", "flat", "apart"]) -> Table:
    """Gains of norms of q and k that each head has its own of, by the tensors' names within a layer."""
    return {
        f"layers.{{i}}.mixer.{ours}.weight": HeadNorm(LAYER + theirs, form) for ours, theirs in (("q_norm", q), ("k_norm", k))
    }


def moe_tensors(
    *,
    layer: str = LAYER,
    router: str = "mlp.gate",
    experts: str = "mlp.experts",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    shared: str = "mlp.shared_experts",
    choice_bias: str | None = None,
) -> Table:
    """Experts of a tensor each, or fused as transformers 5 holds them; to be added to a table of `tensors`.

    Args:
        names: of an expert's gate, up and down.
        choice_bias: the tensor, if it is not the router's own.
    """
    gate, up, down = (f"{layer}{experts}.{{e}}.{name}.weight" for name in names)
    ours = "layers.{i}.mlp."
    return {
        f"{ours}router": Projection(f"{layer}{router}.weight"),
        f"{ours}router_bias": Same(f"{layer}{router}.bias"),
        f"{ours}choice_bias": Same(layer + (choice_bias or f"{router}.e_score_correction_bias")),
        f"{ours}experts_up": OneOf((ExpertUp((gate, up)), FusedUp(f"{layer}{experts}.gate_up_proj"))),
        f"{ours}experts_down": OneOf((ExpertDown(down), FusedDown(f"{layer}{experts}.down_proj"))),
        f"{ours}shared.up": Stack((f"{layer}{shared}.gate_proj.weight", f"{layer}{shared}.up_proj.weight")),
        f"{ours}shared.up_bias": Stack((f"{layer}{shared}.gate_proj.bias", f"{layer}{shared}.up_proj.bias")),
        f"{ours}shared.down": Projection(f"{layer}{shared}.down_proj.weight"),
        f"{ours}shared.down_bias": Same(f"{layer}{shared}.down_proj.bias"),
        f"{ours}shared_gate": Projection(f"{layer}{shared}_gate.weight"),
    }
