"""How each architecture is checked against Hugging Face transformers. tests/models/test_checks.py holds it to the truth."""

from __future__ import annotations

from jaxserve.models.registry import ARCHITECTURES

LOGITS: dict[str, int] = {
    "AXK1ForCausalLM": 1,
    "AfmoeForCausalLM": 1,
    "ApertusForCausalLM": 1,
    "ArceeForCausalLM": 1,
    "BailingHybridForCausalLM": 1,
    "BambaForCausalLM": 1,
    "BioGptForCausalLM": 1,
    "BitNetForCausalLM": 1,
    "BloomForCausalLM": 1,
    "CodeGenForCausalLM": 1,
    "Cohere2ForCausalLM": 1,
    "Cohere2MoeForCausalLM": 2,
    "CohereForCausalLM": 1,
    "CwmForCausalLM": 1,
    "DbrxForCausalLM": 1,
    "DeepseekV2ForCausalLM": 2,
    "DeepseekV3ForCausalLM": 1,
    "DiffLlamaForCausalLM": 1,
    "DogeForCausalLM": 1,
    "Dots1ForCausalLM": 1,
    "Ernie4_5ForCausalLM": 1,
    "Ernie4_5_MoeForCausalLM": 1,
    "Exaone4ForCausalLM": 1,
    "ExaoneMoeForCausalLM": 1,
    "FalconForCausalLM": 2,
    "FalconH1ForCausalLM": 2,
    "FalconMambaForCausalLM": 1,
    "FlexOlmoForCausalLM": 1,
    "GPT2LMHeadModel": 1,
    "GPTBigCodeForCausalLM": 1,
    "GPTJForCausalLM": 1,
    "GPTNeoForCausalLM": 1,
    "GPTNeoXForCausalLM": 1,
    "Gemma2ForCausalLM": 1,
    "Gemma3ForCausalLM": 2,
    "Gemma3nForCausalLM": 1,
    "Gemma4ForCausalLM": 3,
    "Gemma4UnifiedForCausalLM": 1,
    "GemmaForCausalLM": 1,
    "Glm4ForCausalLM": 1,
    "Glm4MoeForCausalLM": 1,
    "Glm4MoeLiteForCausalLM": 1,
    "GlmForCausalLM": 1,
    "GptOssForCausalLM": 1,
    "GraniteForCausalLM": 1,
    "GraniteMoeForCausalLM": 1,
    "GraniteMoeHybridForCausalLM": 2,
    "GraniteMoeSWAForCausalLM": 1,
    "GraniteMoeSharedForCausalLM": 1,
    "GraniteSWAForCausalLM": 1,
    "HYV3ForCausalLM": 1,
    "HeliumForCausalLM": 1,
    "HunYuanDenseV1ForCausalLM": 1,
    "HunYuanMoEV1ForCausalLM": 1,
    "HyperCLOVAXForCausalLM": 1,
    "Jais2ForCausalLM": 1,
    "JambaForCausalLM": 1,
    "KimiLinearForCausalLM": 1,
    "LagunaForCausalLM": 1,
    "Lfm2ForCausalLM": 2,
    "Lfm2MoeForCausalLM": 1,
    "Lfm3ForCausalLM": 1,
    "Llama4ForCausalLM": 1,
    "LlamaForCausalLM": 4,
    "LongcatFlashForCausalLM": 1,
    "Mamba2ForCausalLM": 2,
    "MambaForCausalLM": 2,
    "MellumForCausalLM": 1,
    "MiMoV2FlashForCausalLM": 1,
    "MiniCPM3ForCausalLM": 1,
    "MiniMaxForCausalLM": 1,
    "MiniMaxM2ForCausalLM": 1,
    "Ministral3ForCausalLM": 1,
    "MinistralForCausalLM": 1,
    "Mistral4ForCausalLM": 1,
    "MistralForCausalLM": 1,
    "MixtralForCausalLM": 1,
    "MptForCausalLM": 1,
    "NanoChatForCausalLM": 1,
    "NemotronForCausalLM": 1,
    "NemotronHForCausalLM": 1,
    "OPTForCausalLM": 2,
    "Olmo2ForCausalLM": 1,
    "Olmo3ForCausalLM": 1,
    "OlmoForCausalLM": 1,
    "OlmoHybridForCausalLM": 1,
    "OlmoeForCausalLM": 1,
    "PersimmonForCausalLM": 1,
    "Phi3ForCausalLM": 3,
    "PhiForCausalLM": 1,
    "PhimoeForCausalLM": 1,
    "Qwen2ForCausalLM": 2,
    "Qwen2MoeForCausalLM": 1,
    "Qwen3ForCausalLM": 1,
    "Qwen3MoeForCausalLM": 1,
    "Qwen3NextForCausalLM": 1,
    "Qwen3_5ForCausalLM": 1,
    "Qwen3_5MoeForCausalLM": 1,
    "RecurrentGemmaForCausalLM": 1,
    "RwkvForCausalLM": 1,
    "SeedOssForCausalLM": 1,
    "SmolLM3ForCausalLM": 1,
    "SolarOpenForCausalLM": 1,
    "StableLmForCausalLM": 2,
    "Starcoder2ForCausalLM": 1,
    "VaultGemmaForCausalLM": 1,
    "XGLMForCausalLM": 1,
    "YoutuForCausalLM": 1,
    "Zamba2ForCausalLM": 2,
}
"""Architecture -> cases in tests/goldens: logits of tiny checkpoints, through chunked prefill and paged decode."""

OTHERS = {
    "LlamaForCausalLM": "text of SmolLM2",
    "Gemma3ForConditionalGeneration": "as Gemma3ForCausalLM, which is its text part",
    "Gemma3nForConditionalGeneration": "as Gemma3nForCausalLM, which is its text part",
    "Gemma4ForConditionalGeneration": "as Gemma4ForCausalLM, which is its text part",
    "Gemma4UnifiedForConditionalGeneration": "as Gemma4UnifiedForCausalLM, which is its text part",
    "Llama4ForConditionalGeneration": "as Llama4ForCausalLM, which is its text part",
    "InternLM3ForCausalLM": "as LlamaForCausalLM, as which transformers runs it",
    "IQuestCoderForCausalLM": "as LlamaForCausalLM, as which transformers runs it",
    "InternVLForConditionalGeneration": "as LlamaForCausalLM and its like, which are its text part",
    "LlavaForConditionalGeneration": "as LlamaForCausalLM and its like, which are its text part",
    "LlavaNextForConditionalGeneration": "as LlamaForCausalLM and its like, which are its text part",
    "LlavaOnevisionForConditionalGeneration": "as LlamaForCausalLM and its like, which are its text part",
    "Idefics3ForConditionalGeneration": "as LlamaForCausalLM, which is its text part",
    "SmolVLMForConditionalGeneration": "as LlamaForCausalLM, which is its text part",
    "Mistral3ForConditionalGeneration": "as MistralForCausalLM or Ministral3ForCausalLM, which is its text part",
    "Qwen2VLForConditionalGeneration": "as Qwen2ForCausalLM, which is its text part",
    "Qwen2_5_VLForConditionalGeneration": "as Qwen2ForCausalLM, which is its text part",
    "Qwen3VLForConditionalGeneration": "as Qwen3ForCausalLM, which is its text part",
    "Qwen3VLMoeForConditionalGeneration": "as Qwen3MoeForCausalLM, which is its text part",
    "Qwen3_5ForConditionalGeneration": "as Qwen3_5ForCausalLM, which is its text part",
    "Qwen3_5MoeForConditionalGeneration": "as Qwen3_5MoeForCausalLM, which is its text part",
}


def check_of(name: str) -> str:
    """What is compared for one architecture."""
    count = LOGITS.get(name, 0)
    parts = [f"logits of {count} tiny checkpoint{'s' if count > 1 else ''}"] if count else []
    return "; ".join([*parts, *([OTHERS[name]] if name in OTHERS else [])])


def models_table() -> str:
    """README's table of architectures."""
    rows = sorted((a.name, a.model_type, check_of(a.name)) for a in ARCHITECTURES)
    lines = ["| architecture | model_type | checked against transformers |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {kind} | {check} |" for name, kind, check in rows)])


def models_list() -> str:
    """What `jaxserve models` prints."""
    rows = sorted((a.name, check_of(a.name)) for a in ARCHITECTURES)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {check}" for name, check in rows)
