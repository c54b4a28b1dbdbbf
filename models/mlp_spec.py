"""Feed-forward blocks as data: one block for all tokens, or experts that a router chooses from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxserve.models.norm_spec import NormSpec

Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu2", "xielu"]


@dataclass(frozen=True, kw_only=True)
class ClampedSwiglu:
    """gpt-oss's gate: gate * sigmoid(alpha * gate) * (up + 1), with gate at most `limit` and up within +-limit."""

    alpha: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class MlpSpec:
    """A feed-forward block.

    Attributes:
        dim: F.
        gated: activation(gate) * up; otherwise activation(up).
        bias: a bias on every projection.
        clamped: replaces activation(gate) * up.
        hidden_norm: normalises what goes into the last projection (BitNet).
        sparsity: of the gate's values, the share that is cut off as were they normally distributed (Gemma 3n).
        gate_multiplier: of what goes into the activation.
        out_multiplier: of the output.
    """

    dim: int
    activation: Activation
    gated: bool = True
    bias: bool = False
    clamped: ClampedSwiglu | None = None
    hidden_norm: NormSpec | None = None
    sparsity: float = 0.0
    gate_multiplier: float = 1.0
    out_multiplier: float = 1.0

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1; got {self.dim}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be from 0 to less than 1; got {self.sparsity}")


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """How a token's experts are chosen and weighted.

    Attributes:
        scores: of all experts, from the router's logits. "sparsemixer" is Phi-3.5-MoE's own rule for two experts
            (https://arxiv.org/abs/2409.12136).
        norm: of what the router sees.
        logit_multiplier: factor on the logits.
        logit_softcap: logits become softcap * tanh(logits / softcap).
        bias: on the logits.
        choice_bias: an array added to the scores for the choice alone, not for the weights (DeepSeek V3).
        num_groups, top_groups: experts are chosen from the best top_groups of num_groups groups.
        group_score: a group counts as much as its best expert, or as its best two together.
        normalize: the chosen experts' scores are divided by their sum.
        norm_eps: added to that sum.
        norm_min: that sum is at least this.
        scale: of the weights, after that.
        expert_scale: an array of factors on the weights as well, one for each expert (Gemma 4).
        jitter: how far below the best a logit may be and still take part in sparsemixer's softmax.
    """

    scores: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    norm: NormSpec | None = None
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    bias: bool = False
    choice_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["best", "best_two"] = "best"
    normalize: bool = True
    norm_eps: float = 0.0
    norm_min: float = 0.0
    scale: float = 1.0
    expert_scale: bool = False
    jitter: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MoeSpec:
    """A mixture of experts.

    Attributes:
        num_identity: experts numbered behind those, which give back what goes in (LongCat).
        top_k: experts of each token.
        expert: each of the experts.
        shared: an expert that every token goes through as well.
        shared_gate: its output is multiplied by sigmoid of a projection to one number.
        out_norm: of the sum of all experts, the shared one included (A.X K1).
        norms: the experts and the shared one have norms of their own, before and behind each; what comes in has had none
            (Gemma 4).
        weight_on_input: an expert's weight multiplies what goes in, not what comes out (Llama 4).
    """

    num_experts: int
    num_identity: int = 0
    top_k: int
    expert: MlpSpec
    router: RouterSpec
    shared: MlpSpec | None = None
    shared_gate: bool = False
    out_norm: NormSpec | None = None
    norms: NormSpec | None = None
    weight_on_input: bool = False

    def __post_init__(self) -> None:
        router = self.router
        num_choices = self.num_experts + self.num_identity
        if not 1 <= self.top_k <= num_choices:
            raise ValueError(f"each token must have from 1 to {num_choices} experts; got {self.top_k}")
        if self.num_identity and router.num_groups > 1:
            raise ValueError("experts that give back what goes in are in no groups")
        if self.num_experts % router.num_groups or not 1 <= router.top_groups <= router.num_groups:
            raise ValueError(
                f"{router.top_groups} of {router.num_groups} groups cannot be chosen among {self.num_experts} experts"
            )
        if self.top_k > num_choices // router.num_groups * router.top_groups:
            raise ValueError(f"{self.top_k} experts cannot be chosen from {router.top_groups} groups")
        if router.group_score == "best_two" and router.num_groups > 1 and self.num_experts // router.num_groups < 2:
            raise ValueError(f"groups of one expert have no best two; got {router.num_groups} groups")
        if router.scores == "sparsemixer" and self.top_k != 2:
            raise ValueError(f"sparsemixer chooses 2 experts; got {self.top_k}")
