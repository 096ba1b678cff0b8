"""Tiny random models of the architectures that transformers knows, for tools/audit_hf.py.

A configuration is shrunk by the names of its fields: widths, heads, experts and vocabulary to a few
channels, windows, blocks and chunks to a few tokens, so that short sequences go beyond them; of
the layers one of each kind is kept. Weights get noise, since one that starts at zero hides what it
scales. Nothing here reads the network, a pickle or code that comes with a model.
"""
import os
from pathlib import Path

import torch

from base.command_line import nearest
from base.errors import BadInput
from base.files import exists, is_file, read_json
from base.user_code import in_words

# before transformers is imported: no network, and none of the code that a hub keeps as "kernels"
os.environ.update(HF_HUB_OFFLINE="1", USE_HUB_KERNELS="0", TRANSFORMERS_VERBOSITY="error")

VOCABULARY = 256     # more than most sequences have tokens, so that none need repeat
FIRST_TOKEN = 16     # tokens with a meaning of their own have the numbers below
WINDOW = 8           # tokens of a window, block or chunk
NOISE = 0.2

# windows, blocks and chunks, in tokens
WINDOWS = ("sliding_window attention_chunk_size sliding_window_size window_size local_attention "
           "attention_window_size index_topk local_attn_chunk_length lsh_attn_chunk_length "
           "mamba_chunk_size chunk_size rel_extent keep_window_size floor_scale "
           "log_scaling_n_floor local_attention_window_len index_block_size")
# what a field is called, over all architectures: its size in the tiny model
NAMES = (
    (32, "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim "
        "input_embedding_size output_embedding_size lru_width attention_hidden_size mamba_d_ssm "
        "ple_embed_dim backbone_hidden_size"),
    (48, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim moe_intermediate_size d_inner "
        "shared_expert_intermediate_size dim_ff dff ffn_hidden_size expert_ffn_hidden_size "
        "shared_intermediate_size feed_forward_size intermediate_size_mlp dense_intermediate_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size"),
    (4, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
       "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
       "swa_num_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts "
       "linear_num_value_heads linear_num_heads zero_expert_num o_groups"),
    (2, "linear_num_key_heads encoder_layers num_encoder_layers decoder_layers num_decoder_layers "
       "n_group num_expert_group hc_lowrank num_centroids"),
    (1, "topk_group num_nextn_predict_layers first_k_dense_replace num_dense_layers n_groups "
       "mamba_n_groups mamba_ngroups moe_layer_start_index"),
    (8, "head_dim dim_head d_head v_head_dim qk_nope_head_dim attention_head_size swa_head_dim "
       "linear_key_head_dim linear_value_head_dim linear_head_dim kv_channels index_head_dim "
       "mamba_d_head mamba_head_dim mamba_headdim"),
    (16, "q_lora_rank kv_lora_rank o_lora_rank state_size mamba_d_state ssm_state_size "
        "time_step_rank mamba_dt_rank laurel_rank hidden_size_per_layer_input d_rel "
        "router_hidden_size gated_norm_rank loop_gate_rank adapter_rank"),
    (4, "qk_rope_head_dim rotary_dim"),
    (12, "qk_head_dim"),
    # a token's score is 0 where no head is positive: with few heads the best are ties
    (32, "index_n_heads"),
    (WINDOW, WINDOWS),
    (4, "block_size"),
    (VOCABULARY, "vocab_size unpadded_vocab_size vocab_size_per_layer_input decoder_vocab_size "
                "encoder_hash_byte_group_vocab ngram_vocab_size_base"),
)
SIZES = {name: size for size, names in NAMES for name in names.split()}
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx",
             "max_target_positions", "max_source_positions", "context_length")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
AT_MOST = {  # of what is chosen among experts, heads or blocks
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2,
    "num_key_value_heads": 2, "num_kv_heads": 2, "swa_num_key_value_heads": 2,
    "num_query_groups": 2, "index_topk_blocks": 2, "num_random_blocks": 1, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "mamba_n_heads": 8, "n_mamba_heads": 2,
    "mamba_num_heads": 8, "hc_sinkhorn_iters": 4,
}
# of one architecture: what its sizes need to fit each other, or to be a causal language model
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
QWEN4 = dict(indexer_n_heads=32, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8,
             indexer_compress_ratio=4)
OWN = {
    "bamba": dict(attn_layer_indices=[1]),
    "cohere_compass_text": dict(
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE}),
    "dbrx": dict(attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
                 ffn_config={"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4,
                             "moe_top_k": 2}),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "dory": dict(num_hidden_layers=4, n_input_layers=1, n_recurrent_layers=2, n_output_layers=1,
                 layer_types=["sliding_attention", "full_attention"] * 2),
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1),
    "dots3_note_text": dict(
        swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=16,
        swa_kv_lora_rank=16, swa_head_dim=12, swa_qk_nope_head_dim=8, swa_v_head_dim=8),
    "gemma3n_text": dict(num_hidden_layers=4, num_kv_shared_layers=2, intermediate_size=48,
                         layer_types=["sliding_attention", "full_attention"] * 2,
                         activation_sparsity_pattern=[0.9, 0.0, 0.9, 0.0]),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "jamba": dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1,
                  expert_layer_period=3),
    "lfm2_moe": dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"]),
    "mamba2": dict(num_heads=8),
    "nemotron": dict(num_key_value_heads=2),
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(axial_pos_shape=[16, 32], axial_pos_embds_dim=[16, 16], num_buckets=8,
                     hash_seed=0),
    "xlstm": dict(hidden_size=128, embedding_dim=128),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(attention_hidden_size=64, attention_head_dim=16, num_hidden_layers=4,
                  layers_block_type=["linear_attention", "hybrid"] * 2),
    "zamba2": dict(attention_hidden_size=64, attention_head_dim=16, n_mamba_heads=8),
}
SKIPPED = {  # not text models of their own
    "blt": "reads bytes in patches that another model cuts",
    "dots3_note": "pictures and sound around dots3_note_text, which is audited",
    "gemma3n": "pictures and sound around gemma3n_text, which is audited",
    "gemma4_assistant": "drafts for another model, whose states it reads",
    "gemma4_unified_assistant": "drafts for another model, whose states it reads",
    "musicgen": "reads several codebooks of sound a step",
    "musicgen_melody": "reads several codebooks of sound a step",
}
CAUSAL = {"is_decoder": True, "causal": True}  # where a configuration has such a field


def shrunk(config):
    """A configuration of the same class and kind, tiny."""
    values = config.to_dict()
    new = {name: value for name, value in CAUSAL.items() if name in values}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            new[name] = shrunk(part)
    for name, value in values.items():
        if name in new or name == "model_type":
            continue
        if name.endswith("_token_id") and value is not None:
            new[name] = small_token(name, value)
        elif "drop" in name and isinstance(value, float):
            new[name] = 0.0
        elif name == "head_dim" and value is None:
            new[name] = 8
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            size = size_of(name, value, values)
            if size is not None and size != value:
                new[name] = size
    return type(config)(**new | layers(values) | OWN.get(config.model_type, {}))


def size_of(name, value, values):
    """What the field `name` is in the tiny model, or None: as it is."""
    if name == "head_dim" and "qk_rope_head_dim" in values:
        return 4
    if "key_value_heads" in name and value == values.get(name.replace("key_value", "attention")):
        return 4  # as many as queries have
    if name in POSITIONS:
        return 512
    if name in AT_MOST:
        return min(value, AT_MOST[name])
    return min(value, SIZES[name]) if name in SIZES else None


def small_token(name, value):
    number = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, 3)
    return [number] if isinstance(value, list) else number


def layers(values):
    """The number of layers and all lists that have an entry a layer: one layer of each kind, two at
    least."""
    for count in LAYERS:
        n = values.get(count)
        if isinstance(n, int) and n > 0:
            break
    else:
        return {}
    lists = {name: value for name, value in values.items()
             if isinstance(value, list) and len(value) == n}
    kinds = {}
    for i, kind in enumerate(zip(*map(map_text, lists.values()))):
        kinds.setdefault(kind, i)
    kept = sorted(kinds.values())
    if len(kept) < 2:
        kept = list(range(min(n, 2)))
    return {count: len(kept)} | {name: [value[i] for i in kept] for name, value in lists.items()}


def map_text(value):
    return map(str, value)


# Building -----------------------------------------------------------------------------------------

def auto():
    """(config classes by model type, AutoModelForCausalLM, model types with a causal language
    model). BadInput without transformers."""
    try:
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError as error:
        raise BadInput(f"--hf needs transformers ({in_words(error)}): pip install transformers") \
            from error
    return CONFIG_MAPPING, AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def tiny(config, dtype):
    """A random model of a configuration, shrunk, in evaluation mode."""
    torch.manual_seed(0)
    more = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = auto()[1].from_config(shrunk(config), trust_remote_code=False, **more)
    return noisy(model.to(dtype).eval())


@torch.no_grad()
def noisy(model):
    """The model with noise on all weights, the same for every precision."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.nan_to_num_(0, 0, 0)
        p += NOISE * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return model.requires_grad_(False)


def default_config(model_type):
    """The default configuration of an architecture. BadInput."""
    configs, _, causal = auto()
    if model_type not in causal:
        raise BadInput(f"--hf={model_type}: transformers has no causal language model of that type"
                       f"{nearest(model_type, list(causal), '')}; a folder needs a config.json")
    if model_type in SKIPPED:
        raise BadInput(f"--hf={model_type}: {SKIPPED[model_type]}")
    return configs[model_type]()


def build(name, dtype):
    """A model of a type or folder in a precision. BadInput."""
    if not exists(name) or not Path(name).is_dir():
        return tiny(default_config(name), dtype)
    return of_folder(Path(name), dtype)


def of_folder(folder, dtype):
    """The model of a local folder; tiny and random where it has no weights. BadInput."""
    config = read_config(folder)
    names = sorted(path.name for path in folder.iterdir())
    if not any(name.endswith(".safetensors") for name in names):
        if any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names):
            raise BadInput(f"{folder} has its weights in a pickle, which could run code, and no "
                           "model.safetensors; convert them, or leave the weights out to audit the "
                           "architecture")
        return tiny(config, dtype)
    if "adapter_config.json" in names:
        raise BadInput(f"{folder} holds an adapter; merge it into its model first")
    try:
        model = auto()[1].from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True,
            trust_remote_code=False, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"{folder} does not load: {in_words(error)}") from error
    return model.eval().requires_grad_(False)


def read_config(folder):
    """The configuration of a folder: of a type that transformers itself knows, without what would
    fetch or run anything. BadInput."""
    path = folder / "config.json"
    if not is_file(path):
        raise BadInput(f"{folder} has no config.json; name a model's folder or a type such as "
                       "llama")
    values = read_json(path, "fetch the model again")
    configs, _, causal = auto()
    model_type = values.get("model_type")
    if model_type not in causal:
        own = "; its own code (auto_map) is not run" if "auto_map" in values else ""
        raise BadInput(f"{path}: transformers has no causal language model of type "
                       f"{model_type!r}{own}")
    for name in ("auto_map", "quantization_config", "attn_implementation",
                 "_attn_implementation", "experts_implementation", "_experts_implementation"):
        values.pop(name, None)
    try:
        return configs[model_type].from_dict(values)
    except Exception as error:  # whatever a class makes of values that do not fit
        raise BadInput(f"{path} does not fit {model_type}: {in_words(error)}") from error


def thresholds(config):
    """{name: tokens} of the windows, blocks and chunks in a configuration, its parts' too."""
    found = {}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            found |= {f"{name}.{key}": value for key, value in thresholds(part).items()}
    for name, value in config.to_dict().items():
        if name in (*WINDOWS.split(), "block_size") and isinstance(value, int) and value > 1:
            found[name] = value
    return found
