"""Reference cases of models without experts: case -> (model_type, config fields beside make_goldens.BASE).

Fields of BASE that a config does not have are left out.
"""

from typing import Any

GPT2: dict[str, Any] = {"n_positions": 256, "n_embd": 64, "n_layer": 3, "n_head": 4, "tie_word_embeddings": True}
LAYERS4: dict[str, Any] = {"sliding_window": 8, "num_hidden_layers": 4}
YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MULTIPLIERS: dict[str, Any] = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
GEMMA2: dict[str, Any] = {
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 20.0,
    "final_logit_softcapping": 15.0,
}
GEMMA4_SMALL: dict[str, Any] = {  # with what the smallest ones have
    "num_hidden_layers": 4,
    "head_dim": 16,
    "global_head_dim": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "vocab_size_per_layer_input": 160,
    "hidden_size_per_layer_input": 12,
    "tie_word_embeddings": True,
}
GEMMA4: dict[str, Any] = {
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "final_logit_softcapping": 15.0,
    "tie_word_embeddings": True,
}
GEMMA3N: dict[str, Any] = {
    "num_hidden_layers": 5,
    "intermediate_size": [96, 96, 64, 64, 64],
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0, 0.0],
    "vocab_size_per_layer_input": 150,
    "hidden_size_per_layer_input": 12,
    "altup_num_inputs": 3,
    "altup_active_idx": 1,
    "laurel_rank": 10,
    "tie_word_embeddings": True,
}
GEMMA4_UNIFIED: dict[str, Any] = {
    "num_hidden_layers": 2,
    "head_dim": 16,
    "global_head_dim": 24,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "tie_word_embeddings": True,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 10 for i in range(8)],
    "long_factor": [2.0 + i / 10 for i in range(8)],
    "original_max_position_embeddings": 64,
}
PAST: dict[str, Any] = {"original_max_position_embeddings": 32}  # which the 48 tokens outgrow
LATENT_LONGROPE = LONGROPE | PAST | {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
OPT: dict[str, Any] = {"ffn_dim": 96, "num_hidden_layers": 3, "word_embed_proj_dim": 64, "tie_word_embeddings": True}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_yarn": ("llama", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False}}),
    "ministral": ("ministral", {"head_dim": 16, "sliding_window": 8}),
    "ministral3": ("ministral3", {"head_dim": 16, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.5}}),
    "arcee": ("arcee", {}),
    "helium": ("helium", {"head_dim": 16}),
    "seed_oss": ("seed_oss", {"head_dim": 24}),
    "granite": ("granite", MULTIPLIERS),
    "granite_swa": (
        "granite_swa",
        MULTIPLIERS | {"sliding_window": 8, "num_hidden_layers": 4, "layer_rope_theta": [10000.0, 500.0, 0, 500.0]},
    ),
    "hyperclovax": ("hyperclovax", MULTIPLIERS),
    "minicpm3": ("minicpm3", LATENT | {"scale_emb": 3, "dim_model_base": 32, "rope_parameters": LATENT_LONGROPE}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0]}),
    "cwm": ("cwm", {"head_dim": 16, "sliding_window": 8}),
    "ernie4_5": ("ernie4_5", {"head_dim": 16, "use_bias": True}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 16}),
    "nanochat": ("nanochat", {}),
    "bitnet": ("bitnet", {}),
    "apertus": ("apertus", {}),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3_longrope_past": ("phi3", {"rope_parameters": LONGROPE | PAST, "original_max_position_embeddings": 32}),
    "phi3_longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "gemma": ("gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA2 | LAYERS4),
    "gemma3n_text": ("gemma3n_text", GEMMA3N),
    "gemma4_small": ("gemma4_text", GEMMA4_SMALL),
    "gemma4_unified_text": ("gemma4_unified_text", GEMMA4_UNIFIED),
    "gemma4_text": ("gemma4_text", GEMMA4),
    "vaultgemma": ("vaultgemma", GEMMA2 | {"sliding_window": 8}),
    "olmo": ("olmo", {"clip_qkv": 2.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", LAYERS4),
    "exaone4": ("exaone4", LAYERS4 | {"sliding_window_pattern": 4}),
    "cohere": ("cohere", {"logit_scale": 0.25, "use_qk_norm": True, "tie_word_embeddings": True}),
    "cohere2": ("cohere2", LAYERS4 | {"logit_scale": 0.25}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.25}),
    "stablelm_parallel": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "nemotron": ("nemotron", {"partial_rotary_factor": 0.5}),
    "jais2": ("jais2", {}),
    "persimmon": ("persimmon", {"partial_rotary_factor": 0.5}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "gpt2": ("gpt2", GPT2),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "gpt_neo": ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 8}),
    "codegen": ("codegen", GPT2 | {"rotary_dim": 8}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.25}),
    "opt": ("opt", OPT),
    "opt_post_norm": ("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 40}),
    "biogpt": ("biogpt", {}),
    "xglm": ("xglm", {"d_model": 64, "ffn_dim": 96, "num_layers": 3, "attention_heads": 4, "pad_token_id": 1}),
    "bloom": ("bloom", {"n_layer": 3, "n_head": 6, "hidden_size": 96, "tie_word_embeddings": True}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "falcon_alibi": ("falcon", {"multi_query": False, "alibi": True, "bias": True}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 256, "tie_word_embeddings": True}),
    "diffllama": ("diffllama", {}),
    "doge": ("doge", {}),
    "youtu": ("youtu", LATENT),
}
