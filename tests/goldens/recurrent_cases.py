"""Reference cases of models with recurrent layers: case -> (model_type, what differs from make_goldens.BASE)."""

from typing import Any

MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
}
FALCON_H1 = {
    "mamba_d_ssm": 128,
    "ssm_multipliers": [0.5, 1.5, 0.7, 1.3, 1.2],
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.4,
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 0.8,
    "key_multiplier": 0.6,
    "mlp_multipliers": [0.9, 0.7],
    "embedding_multiplier": 3.0,
    "lm_head_multiplier": 0.5,
}
FALCON_H1_NORM = {
    "mamba_rms_norm": True,
    "mamba_norm_before_gate": True,
    "mamba_d_ssm": 64,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "attention_bias": True,
    "mlp_bias": True,
    "projectors_bias": True,
    "mamba_proj_bias": True,
    "tie_word_embeddings": True,
}
NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"],
    "head_dim": 16,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 12,
    "n_groups": 2,
    "chunk_size": 16,
    "num_hidden_layers": 4,
    "n_routed_experts": 8,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 40,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
GRANITE = MAMBA2 | {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 64,
    "layer_types": ["mamba", "attention", "mamba"],
    "position_embedding_type": "rope",
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
DELTA = {
    "head_dim": 32,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
}
KIMI = {
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "num_hidden_layers": 2,
    "linear_head_dim": 12,
    "linear_num_heads": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
LING3 = {
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "num_hidden_layers": 2,
    "head_dim": 12,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "kv_lora_rank": 24,
    "n_group": 4,
    "topk_group": 2,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
OLMO_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "num_hidden_layers": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 12,
}
EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 40,
}
GEMMA = {
    "lru_width": 96,
    "attention_window_size": 16,
    "head_dim": 16,
    "num_key_value_heads": 1,
    "block_types": ["recurrent", "recurrent", "attention"],
    "tie_word_embeddings": True,
}
ZAMBA2 = {
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "mamba_d_state": 16,
    "mamba_ngroups": 2,
    "n_mamba_heads": 8,
    "layers_block_type": ["hybrid", "mamba", "hybrid", "mamba", "hybrid"],
    "num_mem_blocks": 2,
    "adapter_rank": 6,
    "use_mem_rope": True,
    "chunk_size": 16,
}
LFM2 = {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3}
LFM3 = {
    "layer_types": ["conv", "sliding_attention", "full_attention"],
    "conv_L_cache": 5,
    "head_dim": 16,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}
MINIMAX = {
    "num_local_experts": 4,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "block_size": 16,
    "full_attn_alpha_factor": 1.5,
    "full_attn_beta_factor": 0.8,
    "linear_attn_alpha_factor": 1.2,
    "linear_attn_beta_factor": 0.9,
    "mlp_alpha_factor": 1.4,
    "mlp_beta_factor": 1.1,
}
MAMBA_BIAS = {"expand": 3, "conv_kernel": 3, "time_step_rank": 5, "use_bias": True, "use_conv_bias": False, "hidden_act": "gelu"}
MAMBA2_BIAS = {
    "state_size": 8,
    "num_heads": 4,
    "head_dim": 16,
    "n_groups": 1,
    "expand": 1,
    "chunk_size": 16,
    "use_bias": True,
    "use_conv_bias": False,
    "conv_kernel": 3,
    "tie_word_embeddings": True,
    "time_step_limit": [0.5, 1.5],
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bailing_hybrid": ("bailing_hybrid", LING3),
    "bamba": ("bamba", MAMBA2 | {"attn_layer_indices": [1], "attention_bias": True, "mlp_bias": True}),
    "falcon_h1": ("falcon_h1", MAMBA2 | FALCON_H1),
    "falcon_h1_norm": ("falcon_h1", MAMBA2 | FALCON_H1_NORM),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8, "tie_word_embeddings": True}),
    "granitemoehybrid": ("granitemoehybrid", GRANITE),
    "granitemoehybrid_dense": ("granitemoehybrid", GRANITE | {"num_local_experts": 0, "position_embedding_type": None}),
    "jamba": (
        "jamba",
        {"num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_proj_bias": True},
    ),
    "kimi_linear": ("kimi_linear", KIMI),
    "lfm2": ("lfm2", LFM2 | {"block_ff_dim": 144, "block_multiple_of": 32, "tie_word_embeddings": True}),
    "lfm2_bias": ("lfm2", LFM2 | {"conv_bias": True, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False}),
    "lfm2_moe": (
        "lfm2_moe",
        LFM2 | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_dense_layers": 1},
    ),
    "lfm3": ("lfm3", LFM3),
    "mamba": ("mamba", {"state_size": 8, "tie_word_embeddings": True}),
    "mamba2": ("mamba2", {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2, "expand": 2, "chunk_size": 16}),
    "mamba2_bias": ("mamba2", MAMBA2_BIAS),
    "mamba_bias": ("mamba", MAMBA_BIAS),
    "minimax": ("minimax", MINIMAX),
    "nemotron_h": ("nemotron_h", NEMOTRON_H),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", DELTA | EXPERTS),
    "qwen3_5_text": ("qwen3_5_text", DELTA | {"attention_bias": True, "linear_num_key_heads": 4, "tie_word_embeddings": True}),
    "qwen3_next": ("qwen3_next", DELTA | EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "olmo_hybrid": ("olmo_hybrid", OLMO_HYBRID),
    "recurrent_gemma": ("recurrent_gemma", GEMMA),
    "zamba2": ("zamba2", ZAMBA2 | {"use_shared_attention_adapter": True, "tie_word_embeddings": True}),
    "zamba2_plain": ("zamba2", ZAMBA2 | {"use_mem_rope": False, "add_bias_linear": True, "num_key_value_heads": 2}),
    "rwkv": ("rwkv", {"attention_hidden_size": 96, "intermediate_size": 80, "context_length": 256, "layer_norm_epsilon": 1e-4}),
}
