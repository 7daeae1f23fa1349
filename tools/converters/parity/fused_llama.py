"""InternLM2 and MOSS2 as transformers' LLaMA: their own code, which comes with the weights, is never run.

They differ in names and in `wqkv`, which has for every key-value head its query heads, its key and its
value (internlm/internlm2-7b modeling_internlm2.py).
"""

from typing import Any

import torch
from torch import Tensor
from weight_files import Weights

MODEL_TYPES = ("internlm2", "moss2", "llava_moss2")

# Names of transformers' LLaMA, and theirs.
NAMES = {
    "embed_tokens": "tok_embeddings",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
}

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
)


def build(config: dict[str, Any]) -> Any:
    """The equivalent LlamaForCausalLM, without weights.

    Args:
        config: content of config.json.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = dict(config.get("rope_scaling") or {"type": "default"})
    kind = scaling.pop("type", None) or scaling["rope_type"]
    rotary = {**scaling, "rope_type": kind, "rope_theta": config.get("rope_theta", 1e4)}
    known = {name: config[name] for name in SIZES if name in config}
    known |= {"rope_parameters": rotary, "attn_implementation": "eager"}
    equivalent = LlamaConfig(**known)
    with torch.device("meta"):  # else random weights are drawn first, which takes minutes
        model = LlamaForCausalLM(equivalent)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(equivalent)  # its frequencies are no weights
    model.tie_weights()
    return model.eval()


def read(name: str, weights: Weights, config: Any) -> Tensor:
    """A tensor by the name that it has in transformers' LLaMA.

    Args:
        config: LlamaConfig of the equivalent.
    """
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    if ".self_attn." not in name:
        return weights.read(name)
    layer, part = name.split(".self_attn.")
    fused = weights.read(f"{layer}.attention.wqkv.weight")
    queries = config.num_attention_heads // config.num_key_value_heads
    heads = fused.unflatten(0, (config.num_key_value_heads, queries + 2, -1))  # [g, heads of a group, channels, h]
    parts = {"q": heads[:, :queries], "k": heads[:, queries], "v": heads[:, queries + 1]}
    return parts[part[0]].reshape(-1, fused.shape[1])
