"""LLaVA before it came to transformers: the parts of their own libraries, joined as LLaVA's programs join them.

Source: haotian-liu/LLaVA llava/model/llava_arch.py, multimodal_encoder/clip_encoder.py,
multimodal_projector/builder.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

from parity.probe import watch
from torch import Tensor, nn
from weight_files import Weights

# Where a model keeps its vision tower, if it tuned one, and its projector.
TOWER, PROJECTOR = "model.vision_tower.vision_tower.", "mm_projector."


class JoinedLlava(nn.Module):
    """Tokens int64 [b, s], bool [b, s] where an image embedding goes, images or None -> logits [b, s, v].

    Args:
        tower: takes images [n, 3, h, w].
        tower_layers: its layers; the features are what one of them gives.
        language: of transformers.
        config: LLaVA's config.json.
        has_class_token: whether the tower's first position is one.
    """

    def __init__(
        self,
        tower: nn.Module,
        tower_layers: Sequence[nn.Module] | nn.ModuleList,
        projector: nn.Module,
        language: Any,
        config: dict[str, Any],
        has_class_token: bool,
    ) -> None:
        super().__init__()
        self.tower, self.projector, self.language = tower, projector, language
        layer = config["mm_vision_select_layer"]
        self.chosen = layer - 1 if layer > 0 else layer  # hidden state 0 is what goes into the first layer
        self.drops_first = has_class_token and config.get("mm_vision_select_feature", "patch") == "patch"
        self.hidden: list[Tensor] = []
        for module in tower_layers:
            watch(module, "", lambda _, output: self.hidden.append(output))

    def forward(self, tokens: Tensor, is_image: Tensor, images: Tensor | None) -> Tensor:
        embeddings = self.language.get_input_embeddings()(tokens.masked_fill(is_image, 0))  # [b, s, h]
        if images is not None:
            self.hidden.clear()
            self.tower(images)
            features = self.hidden[self.chosen][:, int(self.drops_first) :]  # [n, i, h]
            embeddings[is_image] = self.projector(features).flatten(0, 1)
        logits: Tensor = self.language(inputs_embeds=embeddings, use_cache=False).logits
        return logits


def read_projector(weights: Weights) -> nn.Module:
    """The projector among a model's tensors: a linear layer, or several with GELU between them.

    The layers are numbered in one torch.nn.Sequential with the GELUs, one alone has no number.
    """
    names = {name.split(PROJECTOR)[1]: name for name in weights.headers if PROJECTOR in name}
    state = {short: weights.read(name) for short, name in names.items()}
    layers: list[nn.Module] = []
    for name in sorted(short.removesuffix("weight") for short in state if short.endswith("weight")):
        rows, columns = state[f"{name}weight"].shape
        layers += [nn.GELU()] if layers else []
        layers.append(nn.Linear(columns, rows, bias=f"{name}bias" in state))
    module = nn.Sequential(*layers) if "weight" not in state else layers[0]
    module.load_state_dict(state)
    return module


def tuned_tower(weights: Weights) -> Callable[[str], Tensor] | None:
    """What reads the tensors of a vision tower that was tuned with the model, by transformers' names, if one was."""
    names = {name.removeprefix(TOWER).removeprefix("vision_model."): name for name in weights.headers}
    if not any(name.startswith(TOWER) for name in weights.headers):
        return None
    return lambda name: weights.read(names[name])
