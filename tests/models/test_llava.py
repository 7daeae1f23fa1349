"""The composed model against megatron-core's own LLaVAModel, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.vision import clip_vit_model
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmcore.config import ParallelConfig
from mmcore.constants import VOCAB_DIVISOR
from mmcore.data.batch import Batch, collate
from mmcore.models.architecture import Architecture
from mmcore.models.language import language_config
from mmcore.models.llava import base_config
from mmcore.models.specs import layer_spec, mlp_submodules
from mmcore.models.splice import splice
from mmcore.models.vision import vision_config
from mmcore.training.step import packed_seq_params
from tests import ranks, tiny

# The oracle always takes the last layer's features.
ORACLE = replace(
    tiny.architecture(),
    vision=replace(tiny.VISION, feature_layer=-1),
    language=replace(tiny.LANGUAGE, vocab_size=2 * VOCAB_DIVISOR),
    image_token_id=2 * VOCAB_DIVISOR,
)


def oracle_model(layout: ParallelConfig, arch: Architecture) -> LLaVAModel:
    base = base_config(layout)
    clip_vit_model.CLIPViTModel.__init__.__defaults__ = tuple(
        WrappedTorchNorm if default is torch.nn.LayerNorm else default
        for default in clip_vit_model.CLIPViTModel.__init__.__defaults__
    )  # it hard-codes a norm that needs Transformer Engine
    language, vision = language_config(arch.language, **base), vision_config(arch.vision, **base)
    language.language_model_type, vision.vision_model_type = "mistral_7b", "clip"
    projector = TransformerConfig(
        num_layers=1,
        hidden_size=arch.language.hidden_size,
        ffn_hidden_size=arch.vision_projection.ffn_hidden_size,
        num_attention_heads=arch.language.num_attention_heads,
        activation_func=torch.nn.functional.gelu,
        **base,
    )
    linears = mlp_submodules("local", fused_norm=False)
    return LLaVAModel(
        language,
        layer_spec("local", AttnMaskType.causal),
        arch.language.padded_vocab_size,
        arch.language.max_position_embeddings,
        vision,
        layer_spec("local", AttnMaskType.no_mask),
        True,
        projector,
        MLPSubmodules(linear_fc1=linears.linear_fc1, linear_fc2=linears.linear_fc2),
        language_position_embedding_type="rope",
        language_rotary_base=arch.language.rotary_base,
        img_h=arch.vision.image_size,
        img_w=arch.vision.image_size,
        patch_dim=arch.vision.patch_dim,
    )


def against_oracle(layout: ParallelConfig) -> tuple[float, float, float, float]:
    ours = tiny.build(layout, arch=ORACLE)
    theirs = oracle_model(layout, ORACLE)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not [key for key in missing if "_extra_state" not in key]
    assert not [key for key in unexpected if "ln_post" not in key]  # kept for the way out, never run

    size, image = 3, ORACLE.vision.num_image_embeddings
    random = torch.Generator().manual_seed(0)
    text = torch.randint(0, ORACLE.language.vocab_size, (size, 9), generator=random)
    images = torch.randn(size, 3, 16, 16, generator=random)
    # theirs: one <image> token, expanded inside; labels are given for the unexpanded text
    tokens = torch.cat([text[:, :2], torch.full((size, 1), -200), text[:, 2:-1]], 1)
    labels = torch.cat([text[:, 1:2], torch.full((size, 1), -200), text[:, 2:]], 1)
    mask = torch.ones(size, tokens.shape[1])
    mask[:, :3] = 0
    positions = torch.arange(tokens.shape[1]).expand(size, -1)
    loss, loss_mask = theirs(images, tokens, positions, None, labels=labels, loss_mask=mask)
    their_loss = (loss * loss_mask).sum()
    # ours: the placeholders are laid out in the data
    laid_out = torch.cat([text[:, :2], torch.full((size, image), ORACLE.image_token_id), text[:, 2:-1]], 1)
    our_labels = torch.cat([torch.zeros(size, image + 1, dtype=torch.long), text[:, 2:]], 1)
    where = torch.zeros(size, laid_out.shape[1], dtype=torch.bool)
    where[:, image + 2 :] = True
    our_loss = ours(laid_out, images, labels=our_labels, positions=where.flatten().nonzero().squeeze(-1)).sum()
    their_loss.backward()
    our_loss.backward()
    worst = 0.0
    others = dict(theirs.named_parameters())
    mine_by_name = {name: mine for name, mine in ours.named_parameters() if "ln_post" not in name}
    assert others.keys() == mine_by_name.keys()
    for name, mine in mine_by_name.items():
        other = others[name]
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            worst = max(worst, float((mine.grad - other.grad).abs().max() / other.grad.abs().max()))
    return float(our_loss), float(their_loss), worst, float(loss_mask.sum() - where.sum())


@pytest.mark.parametrize("size", [1, 2])
def test_equals_megatron_core_llava_model(size: int) -> None:
    """Loss and every gradient; tolerance: float32, their attention sums in another order."""
    layout = ParallelConfig(tensor_model_parallel_size=size)
    for ours, theirs, worst, difference_of_counts in ranks.run(against_oracle, layout, size, layout):
        assert difference_of_counts == 0
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert worst < 2e-5


def each_alone_and_together() -> list[tuple[Tensor, Tensor]]:
    """Losses of every sample by itself, and in one row with others of other lengths."""
    model = tiny.build(ParallelConfig())
    samples = [tiny.sample(seed, images=seed % 3) for seed in (3, 1, 4, 5)]

    def losses(batch: Batch) -> Tensor:
        arguments: Any = {"labels": batch.labels, "positions": batch.loss_positions}
        return model(batch.tokens, batch.images, packed_seq_params=packed_seq_params(batch), **arguments).detach()

    together = losses(collate(samples)).split([int(sample.loss_mask.sum()) for sample in samples])
    alone = []
    for sample in samples:
        batch = collate([sample])
        arguments: Any = {"labels": batch.labels, "positions": batch.loss_positions}
        alone.append(model(batch.tokens, batch.images, **arguments).detach())  # without any packing
    return list(zip(alone, together, strict=True))


def test_samples_of_a_row_do_not_see_each_other() -> None:
    """Attention, positions and pictures; tolerance: torch's kernels sum rows of other lengths in another order."""
    for alone, together in ranks.run(each_alone_and_together, ParallelConfig(), 1)[0]:
        assert len(alone) > 3
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def padded_rows_do_not_matter() -> tuple[float, float]:
    model = tiny.build(ParallelConfig())
    batch = tiny.batch(0, 3)
    arguments: Any = {"labels": batch.labels, "positions": batch.loss_positions}
    before = model(batch.tokens, batch.images, **arguments).sum()
    model.language_model.output_layer.weight.data[tiny.LANGUAGE.vocab_size :] += 100.0
    model.language_model.embedding.word_embeddings.weight.data[tiny.LANGUAGE.vocab_size :] += 100.0
    logits = model(batch.tokens, batch.images, positions=batch.loss_positions)
    assert logits.shape == (len(batch.loss_positions), tiny.LANGUAGE.vocab_size)
    by_hand = torch.nn.functional.cross_entropy(logits, batch.labels.flatten()[batch.loss_positions], reduction="sum")
    torch.testing.assert_close(by_hand, before, rtol=1e-5, atol=0)
    return float(before), float(model(batch.tokens, batch.images, **arguments).sum())


def test_padding_of_the_vocabulary_is_never_predicted() -> None:
    before, after = ranks.run(padded_rows_do_not_matter, ParallelConfig(), 1)[0]
    assert before == after


def text_only_and_layers_above() -> None:
    model = tiny.build(ParallelConfig())
    batch = tiny.batch(0, 2, images=0)
    assert model(batch.tokens, batch.images, labels=batch.labels, positions=batch.loss_positions).isfinite().all()
    images = torch.rand(2, 3, 16, 16)
    features = model.vision_model(images)
    assert features.shape == (2, tiny.VISION.num_image_embeddings, tiny.VISION.hidden_size)
    for parameter in model.vision_model.decoder.layers[2].parameters():  # above feature_layer -2 of 3
        assert not parameter.requires_grad
        parameter.data.fill_(float("nan"))
    torch.testing.assert_close(model.vision_model(images), features, rtol=0, atol=0)


def test_text_only_batches_and_layers_above_the_feature_layer() -> None:
    ranks.run(text_only_and_layers_above, ParallelConfig(), 1)


def test_splice_names_both_counts() -> None:
    text, is_image = torch.zeros(6, 1, 2), torch.tensor([[False, True, True, False, True, False]])
    images = torch.arange(1.0, 7.0).view(3, 2)
    positions = is_image.flatten().nonzero().squeeze(-1)
    spliced = splice(text, images, positions)
    assert spliced[:, 0].tolist() == [[0, 0], [1, 2], [3, 4], [0, 0], [5, 6], [0, 0]]
    with pytest.raises(ValueError, match="3 image placeholders but 4 image embeddings"):
        splice(text, torch.zeros(4, 2), positions)


def overfit() -> list[float]:
    from mmcore.config import OptimizerConfig
    from mmcore.training.optimizer import build_optimizer, build_scheduler, wrap
    from mmcore.training.step import train_step

    model = wrap(tiny.build(ParallelConfig()))
    config = OptimizerConfig(lr=5e-3)
    optimizer = build_optimizer(config, model)
    scheduler = build_scheduler(config, optimizer, 120)
    batch = tiny.batch(0, 4)
    return [train_step(model, optimizer, scheduler, [batch]).total.loss for _ in range(120)]


def test_overfits_to_nothing() -> None:
    losses = ranks.run(overfit, ParallelConfig(), 1)[0]
    assert losses[0] > 3 and losses[-1] < 0.01
