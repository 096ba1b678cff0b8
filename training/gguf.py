"""LLaMA from GGUF: its options and weights in the names and the layout of Hugging Face's."""
import re

from base.errors import BadInput, first_few
from base.files import shown
from base.gguf import REMEDY, not_implemented

# key behind "llama." -> name in Hugging Face's config.json
FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
# further keys, which may say only what follows from those above
HEAD_SIZES = ("rope.dimension_count", "attention.key_length", "attention.value_length")
NEUTRAL = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0}
OTHERS = ("general.", "tokenizer.", "quantize.")  # say nothing of the function computed

# llama.cpp's tensor -> Hugging Face's
OUTER_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama_config(file):
    """What a GGUF of the architecture llama says, as a dict in the names of Hugging Face's
    config.json. BadInput names what we lack."""
    arch = file.values.get("general.architecture")
    if arch != "llama":
        raise not_implemented(file, "general.architecture", arch)
    config = {"model_type": "llama"}
    head_sizes = {}
    for key, value in file.values.items():
        name = key.removeprefix("llama.")
        if key == "llama.vocab_size" or key.startswith(OTHERS):
            continue
        if name in FIELDS and type(value) in (int, float):
            config[FIELDS[name]] = value
        elif name in HEAD_SIZES:
            head_sizes[key] = value
        elif name not in NEUTRAL or value != NEUTRAL[name]:
            raise not_implemented(file, key, value)
    missing = [f"llama.{key}" for key, name in FIELDS.items() if name not in config]
    missing = [key for key in missing if not key.endswith(("head_count_kv", "freq_base"))]
    if "token_embd.weight" not in file.tensors:
        missing.append("token_embd.weight")
    if missing:
        raise BadInput(f"{shown(file.path)} lacks {first_few(missing)}; {REMEDY}")
    for key, value in head_sizes.items():
        if type(value) is not int or value * config["num_attention_heads"] != config["hidden_size"]:
            raise not_implemented(file, key, value)
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    return config


def llama_tensors(file, config):
    """Hugging Face's name -> float32 array. config: of llama_config. BadInput for a tensor that
    LLaMA has no place for, or with a shape that cannot be."""
    tensors = {}
    for name in file.tensors:
        theirs = hugging_face_name(name)
        if theirs is None:
            raise BadInput(f"{shown(file.path)}: no place for its tensor {name[:100]} in LLaMA; "
                           "have LLaMA in its plain form")
        tensor = file.tensor(name)
        n_head = None
        if ".attn_q." in name:
            n_head = config["num_attention_heads"]
        elif ".attn_k." in name:
            n_head = config.get("num_key_value_heads", config["num_attention_heads"])
        if n_head:
            tensor = unpermuted(file, name, tensor, n_head)
        tensors[theirs] = tensor
    return tensors


def hugging_face_name(name):
    """Of a tensor of llama.cpp's, or None: blk.3.attn_q.weight ->
    model.layers.3.self_attn.q_proj.weight."""
    outer = re.fullmatch(r"(\w+)\.(weight|bias)", name)
    if outer and outer[1] in OUTER_TENSORS:
        return f"{OUTER_TENSORS[outer[1]]}.{outer[2]}"
    inner = re.fullmatch(r"blk\.([0-9]{1,6})\.(\w+)\.(weight|bias)", name)
    if inner and inner[2] in BLOCK_TENSORS:
        return f"model.layers.{int(inner[1])}.{BLOCK_TENSORS[inner[2]]}.{inner[3]}"
    return None


def unpermuted(file, name, tensor, n_head):
    """The rows of q or k in the order of Hugging Face's.

    Their RoPE turns channel i of a head with channel i + D/2, llama.cpp's 2i with 2i + 1: its
    converter has put the rows in that order."""
    rows = tensor.shape[0]
    if rows % (2 * n_head):
        raise BadInput(f"{shown(file.path)} is damaged: tensor {name[:100]} has {rows} rows, which "
                       f"{n_head} heads cannot share; {REMEDY}")
    pairs = tensor.reshape(n_head, rows // n_head // 2, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)
