"""Reference cases of models with experts: case -> (model_type, config fields beside make_goldens.BASE)."""

from typing import Any

if __package__:
    from tests.goldens.dense_cases import LATENT, MULTIPLIERS, YARN
else:  # make_goldens.py runs where the project is not installed
    from dense_cases import LATENT, MULTIPLIERS, YARN

QWEN: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
GROUPS: dict[str, Any] = {"n_group": 1, "topk_group": 1}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}
DENSE_FIRST = GROUPS | ROUTED | {"head_dim": 16}

COHERE: dict[str, Any] = {
    "head_dim": 16,
    "num_hidden_layers": 5,
    "num_experts": 4,
    "sliding_window": 8,
    "logit_scale": 0.25,
    "tie_word_embeddings": True,
    "first_k_dense_replace": 1,
    "prefix_dense_intermediate_size": 80,
}
HEATED: dict[str, Any] = YARN | {
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
    "original_max_position_embeddings": 16,
}

GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 40,
    "tie_word_embeddings": True,
}
MIMO: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "head_dim": 24,
    "v_head_dim": 16,
    "attention_bias": True,
    "sliding_window": 9,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
LONGCAT: dict[str, Any] = LATENT | {
    "num_layers": 2,
    "head_dim": 8,
    "ffn_hidden_size": 96,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "moe_topk": 3,
    "expert_ffn_hidden_size": 40,
    "routed_scaling_factor": 2.0,
}
LAGUNA: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads_per_layer": [4, 6],
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 48,
    "moe_routed_scaling_factor": 1.5,
    "moe_router_logit_softcapping": 2.0,
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 8,
}
AXK1: dict[str, Any] = (
    LATENT
    | ROUTED
    | {
        "num_hidden_layers": 2,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
    }
)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", LOCAL),
    "phimoe": ("phimoe", LOCAL),
    "cohere2_moe": ("cohere2_moe", COHERE | {"num_shared_experts": 1}),
    "cohere2_moe_rms": (
        "cohere2_moe",
        COHERE | {"expert_selection_fn": "sigmoid", "rms_norm_eps": 1e-5, "prefix_dense_sliding_window_pattern": 2},
    ),
    "hy_v3": ("hy_v3", QWEN | {"head_dim": 16, "router_scaling_factor": 2.0}),
    "mistral4": ("mistral4", LATENT | ROUTED | {"n_group": 2, "topk_group": 1, "rope_parameters": HEATED}),
    "gemma4_moe": ("gemma4_text", GEMMA4),
    "longcat_flash": ("longcat_flash", LONGCAT),
    "axk1": ("axk1", AXK1),
    "laguna": ("laguna", LAGUNA),
    "mimo_v2_flash": ("mimo_v2_flash", MIMO),
    "qwen2_moe": ("qwen2_moe", QWEN | {"shared_expert_intermediate_size": 80, "norm_topk_prob": False}),
    "qwen3_moe": ("qwen3_moe", QWEN | {"head_dim": 32, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
    "flex_olmo": ("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("granitemoe", LOCAL | MULTIPLIERS),
    "granitemoeshared": ("granitemoeshared", LOCAL | MULTIPLIERS | {"shared_intermediate_size": 40}),
    "granitemoe_swa": (
        "granitemoe_swa",
        LOCAL | MULTIPLIERS | {"shared_intermediate_size": 40, "sliding_window": 8, "layer_rope_theta": [10000.0, 0, 500.0]},
    ),
    "mellum": (
        "mellum",
        QWEN
        | {
            "head_dim": 32,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "sliding_window": 8,
            "norm_topk_prob": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 48,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
        },
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"head_dim": 16, "num_experts": 4, "moe_topk": 2}),
    "minimax_m2": ("minimax_m2", LOCAL | {"head_dim": 16, "rotary_dim": 8}),
    "dbrx": (
        "dbrx",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 4.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "afmoe": (
        "afmoe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "num_dense_layers": 1,
            "head_dim": 16,
            "sliding_window": 8,
            "mup_enabled": True,
        },
    ),
    "deepseek_v2": ("deepseek_v2", LATENT | ROUTED | {"head_dim": 8}),
    "deepseek_v2_groups": (
        "deepseek_v2",
        LATENT
        | ROUTED
        | {
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
            "q_lora_rank": None,
            "routed_scaling_factor": 2.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        LATENT | ROUTED | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "head_dim": 8, "routed_scaling_factor": 1.5},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", LATENT | ROUTED | GROUPS),
    "glm4_moe": ("glm4_moe", DENSE_FIRST | {"partial_rotary_factor": 0.5, "use_qk_norm": True}),
    "dots1": ("dots1", DENSE_FIRST),
    "solar_open": ("solar_open", DENSE_FIRST),
    "exaone_moe": (
        "exaone_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_shared_experts": 1, "head_dim": 16},
    ),
    "gpt_oss": ("gpt_oss", LOCAL | {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 4}),
    "llama4_text": (
        "llama4_text",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 16,
            "num_hidden_layers": 4,
            "floor_scale": 16,
        },
    ),
}
