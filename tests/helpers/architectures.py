"""Tiny random models of every architecture that transformers calls a causal language model."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 97
WINDOW = 6
KINDS = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

# Set where the architecture's own configuration has a key of that name.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "embedding_size": 32, "input_embedding_size": 32,
    "output_embedding_size": 32, "emb_dim": 32, "dim_model": 32, "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48,
    "ffn_hidden_size": 48, "inner_dim": 48, "dim_ff": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "lru_width": 32,
    "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_hidden_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_blocks": 2, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_attention_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "dim_head": 8, "rotary_dim": 4,
    "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "max_sequence_length": 512, "max_seq_len": 512,
    "sliding_window": WINDOW, "attention_window_size": WINDOW, "window_size": WINDOW, "num_experts": 4, "n_routed_experts": 4,
    "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "expert_ffn_hidden_size": 16, "zero_expert_num": 1, "mamba_d_state": 8, "mamba_n_heads": 4,
    "mamba_d_head": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "state_size": 8, "time_step_rank": 4, "ssm_state_size": 8,
    "n_groups": 1, "mamba_n_groups": 1, "mamba_chunk_size": 8, "chunk_size": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "lightning_head_dim": 8, "use_cache": False,
    "is_decoder": True,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}  # DeepSeek's
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
_OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "attn_layers": ["local", "local"],
        "feed_forward_size": 48,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "xmod": {"default_language": "en_XX"},
    "longcat_flash": {"head_dim": 4},  # what its rotary embedding turns
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
    },
    "dbrx": {
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_top_k": 2},
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2},
    },
    "roc_bert": {
        "pronunciation_vocab_size": 11,
        "shape_vocab_size": 11,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _PLAIN),
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "qk_rope_head_dim": 4,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "layer_types": ["sliding_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
    },
}
_OWN["dots3_note_text"] = {
    **{f"swa_{name}": value for name, value in _LATENT.items()},
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 12, "head_dim": 12, "index_head_dim": 8,
    "index_n_heads": 2, "index_topk": 4, "shared_experts_intermediate_size": 16, "mlp_layer_types": ["dense", "sparse"],
    "layer_types": ["sliding_attention", "indexed_attention"],
}  # fmt: skip
_OWN["qwen4_exp_text"] = {
    "hc_lowrank": 8, "ple_embed_dim": 32, "ngram_vocab_size_base": 101, "split_ngram_parts": 2, "indexer_n_heads": 2,
    "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 2,
}  # fmt: skip
# What stands beside the text in configurations for images and sounds.
_SEEN = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14, "output_channels": 16, "mlp_dim": 48, "num_pos_feats": 8,
}  # fmt: skip
_BESIDE: dict[str, dict[str, Any]] = {
    "gemma3": {"vision_config": _SEEN, "mm_tokens_per_image": 4},
    "got_ocr2": {"vision_config": _SEEN},
    "git": {"vision_config": _SEEN},
    "blt": {},
}

# Architectures of one type that compute something else: name → (type, changes).
_DYNAMIC = {**_PLAIN, "rope_type": "dynamic", "factor": 2.0}
_OF_128 = {**_PLAIN, "factor": 4.0, "original_max_position_embeddings": 128}
_LONG = {
    "short_factor": [1.0, 1.1, 1.2, 1.5],
    "long_factor": [2.0, 2.5, 3.0, 4.0],
    "original_max_position_embeddings": 8,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, linear RoPE": ("llama", {"rope_parameters": {**_PLAIN, "rope_type": "linear", "factor": 4.0}}),
    "llama, YaRN": ("llama", {"rope_parameters": {**_OF_128, "rope_type": "yarn"}}),
    "llama, Llama 3 RoPE": (
        "llama",
        {
            "rope_parameters": {
                **_OF_128,
                "rope_type": "llama3",
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
    "llama, dynamic RoPE": ("llama", {"max_position_embeddings": 8, "rope_parameters": _DYNAMIC}),
    "gemma3_text, dynamic RoPE": (
        "gemma3_text",
        {
            "max_position_embeddings": 8,
            "rope_parameters": {"full_attention": _DYNAMIC, "sliding_attention": _PLAIN},
        },
    ),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 8,
            "rope_parameters": {**_PLAIN, **_LONG, "rope_type": "longrope"},
        },
    ),
    "llama4_text, chunks of 8": ("llama4_text", {"attention_chunk_size": 8}),
}
NAMES = (*KINDS, *VARIANTS)


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """A configuration of that name with 2 layers of width 32; ValueError where no small one is known."""
    kind, own = VARIANTS.get(name, (name, {}))
    changes = {**own, **changes}
    base = AutoConfig.for_model(kind)
    given: dict[str, Any] = {**_of(base), **_OWN.get(kind, {}), **changes}
    with contextlib.suppress(ValueError):
        text = base.get_text_config()
        if text is not base:
            inner = next(n for n, part in vars(base).items() if part is text)
            given = {inner: {**_of(text), **_OWN.get(text.model_type, {}), **_OWN.get(kind, {}), **changes}}
    given |= _BESIDE.get(kind, {})
    made = AutoConfig.for_model(kind, **given)
    for part in {id(c): c for c in (made, made.get_text_config())}.values():
        for name, value in part.to_dict().items():  # nothing may be drawn, or two passes would differ
            if isinstance(value, float) and any(
                word in name for word in ("dropout", "pdrop", "jitter", "layerdrop")
            ):
                setattr(part, name, 0.0)
        part._experts_implementation = "eager"  # the grouped product takes no fp64
    return made


def _of(config: PreTrainedConfig) -> dict[str, Any]:
    known = config.to_dict()
    names = {*known, *inspect.signature(type(config).__init__).parameters}
    sizes = {name: value for name, value in _SIZES.items() if name in names}
    if "kv_lora_rank" in known:
        sizes |= {name: value for name, value in _LATENT.items() if name in known}
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads", 4)
    kinds = known.get("layer_types")
    if kinds:
        two = list(dict.fromkeys(kinds))[:2]
        sizes["layer_types"] = two * (2 // len(two))
    return sizes
