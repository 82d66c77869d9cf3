"""Sizes of the bundled random checkpoint.

In: the id of the first special token.  Out: the JSON contents of every config file, with the released field names.
They differ from the released ones only in size; head counts, section splits and layer kinds stay unequal on purpose,
so that a swapped axis or a forgotten repeat changes the result.
"""

NUM_ORDINARY_TOKENS = 522
PREFILL_ROWS = 81


def autoregressive(first_special=NUM_ORDINARY_TOKENS):
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "bos_token_id": first_special,
        "pad_token_id": first_special,
        "eos_token_id": first_special + 2,
        "vision_start_token_id": first_special + 9,
        "vision_end_token_id": first_special + 10,
        "vision_token_id": first_special + 11,
        "image_token_id": first_special + 12,
        "video_token_id": first_special + 13,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 72,
        "initializer_range": 0.02,
        "intermediate_size": 88,
        "max_position_embeddings": 128000,
        "max_window_layers": 4,
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 2, 3]},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.49.0",
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": 560,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 5,
            "fullatt_block_indexes": [1, 4],
            "hidden_act": "silu",
            "hidden_size": 40,
            "in_channels": 3,
            "in_chans": 3,
            "intermediate_size": 52,
            "num_heads": 2,
            "out_hidden_size": 72,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
        },
    }


def generation(config):
    return {
        "bos_token_id": config["bos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
        "do_sample": False,
        "repetition_penalty": 1.0,
        "transformers_version": "4.49.0",
    }


PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}

TRANSFORMER = {
    "dim": 36,
    "num_heads": 3,
    "num_double": 2,
    "num_single": 3,
    "in_channels": 64,
    "context_dim": 40,
    "pooled_dim": 20,
    "axes_dim": [2, 4, 6],
    "theta": 10000,
    "guidance_embed": True,
}

AUTOENCODER = {
    "in_channels": 3,
    "ch": 8,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "z_channels": 16,
    "groups": 4,
    "scale_factor": 0.3611,
    "shift_factor": 0.1159,
}


def clip(vocab_size):
    # eos_token_id 2 is the released value: it makes the pooled token the one with the largest id.
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocab_size,
        "hidden_size": 20,
        "intermediate_size": 44,
        "num_attention_heads": 5,
        "num_hidden_layers": 2,
        "max_position_embeddings": 77,
        "projection_dim": 20,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-05,
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def t5(vocab_size):
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": vocab_size,
        "d_model": 40,
        "d_kv": 6,
        "d_ff": 56,
        "num_layers": 2,
        "num_heads": 5,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-06,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "dropout_rate": 0.1,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
    }


def released():
    """The published sizes, for checking names and shapes without any weights."""
    ar = autoregressive(151643) | {
        "hidden_size": 3584, "intermediate_size": 18944, "max_window_layers": 28, "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
    }
    ar["vision_config"] |= {
        "depth": 32, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_size": 1280, "intermediate_size": 3420,
        "num_heads": 16, "out_hidden_size": 3584,
    }
    return {
        "ar": ar,
        "dit": TRANSFORMER | {
            "dim": 3072, "num_heads": 24, "num_double": 19, "num_single": 38, "context_dim": 4096, "pooled_dim": 768,
            "axes_dim": [16, 56, 56],
        },
        "ae": AUTOENCODER | {"ch": 128, "groups": 32},
        "clip": clip(49408) | {
            "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
            "projection_dim": 768,
        },
        "t5": t5(32128) | {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    }
