"""What megatron-core should hold of Hugging Face's models: loops over heads that know nothing of the converters."""

import torch
from torch import Tensor

State = dict[str, Tensor]


def assert_same(found: State, wanted: State) -> None:
    """Assert that two checkpoints hold the same bits under the same names."""
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def without_prefix(state: State, prefix: str) -> State:
    """The tensors below a prefix, by what comes after it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def fused(parts: tuple[Tensor, Tensor, Tensor], groups: int) -> Tensor:
    """Query, key and value, group by group: the group's query heads, its key head, its value head."""
    query, key, value = (list(part.chunk(groups)) for part in parts)
    return torch.cat([part for group in range(groups) for part in (query[group], key[group], value[group])])


def tower(state: State, heads: int) -> State:
    """A CLIP's or SigLIP's tower, from names such as `encoder.layers.0.layer_norm1.weight`."""
    found = {
        "conv1.weight": state["embeddings.patch_embedding.weight"],
        "position_embeddings.weight": state["embeddings.position_embedding.weight"],
        "ln_post.weight": state["post_layernorm.weight"],
        "ln_post.bias": state["post_layernorm.bias"],
    }
    if "embeddings.class_embedding" in state:
        found["class_token"] = state["embeddings.class_embedding"][None, None]
        found |= {f"ln_pre.{kind}": state[f"pre_layrnorm.{kind}"] for kind in ("weight", "bias")}
    else:
        found["conv1.bias"] = state["embeddings.patch_embedding.bias"]
    names = {
        "self_attention.linear_qkv.layer_norm_": "layer_norm1.",
        "self_attention.linear_proj.": "self_attn.out_proj.",
        "mlp.linear_fc1.layer_norm_": "layer_norm2.",
        "mlp.linear_fc1.": "mlp.fc1.",
        "mlp.linear_fc2.": "mlp.fc2.",
    }
    blocks = [f"encoder.layers.{layer}." for layer in range(_count(state, "encoder.layers."))]
    for kind in ("weight", "bias"):
        for target, source in names.items():
            found[f"decoder.layers.{target}{kind}"] = torch.stack([state[f"{block}{source}{kind}"] for block in blocks])
        qkv = [tuple(state[f"{block}self_attn.{part}_proj.{kind}"] for part in "qkv") for block in blocks]
        found[f"decoder.layers.self_attention.linear_qkv.{kind}"] = torch.stack([fused(parts, heads) for parts in qkv])
    return {f"vision_model.{name}": tensor for name, tensor in found.items()}


def language(state: State, groups: int, rows: int) -> State:
    """A LLaMA, Mistral or Qwen2, from names such as `model.layers.0.input_layernorm.weight`.

    Args:
        rows: of the embedding tables, padding included.
    """

    def padded(table: Tensor) -> Tensor:
        return torch.cat([table, table.new_zeros(rows - len(table), table.shape[1])])

    found = {
        "embedding.word_embeddings.weight": padded(state["model.embed_tokens.weight"]),
        "decoder.final_layernorm.weight": state["model.norm.weight"],
    }
    if "lm_head.weight" in state:
        found["output_layer.weight"] = padded(state["lm_head.weight"])
    names = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    }
    blocks = [f"model.layers.{layer}." for layer in range(_count(state, "model.layers."))]
    for target, source in names.items():
        found[f"decoder.layers.{target}"] = torch.stack([state[block + source] for block in blocks])
    gated = [torch.cat([state[f"{block}mlp.{part}_proj.weight"] for part in ("gate", "up")]) for block in blocks]
    found["decoder.layers.mlp.linear_fc1.weight"] = torch.stack(gated)
    for kind in ("weight", "bias"):
        if f"{blocks[0]}self_attn.q_proj.{kind}" in state:
            qkv = [tuple(state[f"{block}self_attn.{part}_proj.{kind}"] for part in "qkv") for block in blocks]
            whole = torch.stack([fused(parts, groups) for parts in qkv])
            found[f"decoder.layers.self_attention.linear_qkv.{kind}"] = whole
    return {f"language_model.{name}": tensor for name, tensor in found.items()}


def _count(state: State, prefix: str) -> int:
    return 1 + max(int(name.split(".")[0]) for name in without_prefix(state, prefix))
