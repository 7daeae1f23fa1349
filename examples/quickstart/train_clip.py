"""Train a tiny CLIP with open_clip on the quickstart's captions, and save it as open_clip's own trainer does."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from schedule import learning_rate

CONTEXT = 24  # text tokens; the longest caption has 20
VISION = CLIPVisionCfg(
    layers=3,
    width=128,
    head_width=32,
    patch_size=16,
    image_size=64,
    # Learned positions start at 0.09 beside patch embeddings of 0.6: in so few steps the model would not see where
    # anything is.
    pos_embed_type="sin_cos_2d",
)
TEXT = CLIPTextCfg(context_length=CONTEXT, width=64, heads=2, layers=2)
WARMUP = 50  # steps
BATCH = 64  # pictures, with distinct captions: a repeated one would be called wrong


def load_pairs(data: Path, annotations: str) -> tuple[np.ndarray, list[str]]:
    """Pictures, uint8 [n, h, w, 3], and the caption of each, from LLaVA's or COCO's format."""
    content = json.loads((data / annotations).read_text())
    if isinstance(content, dict):
        names = [item["file_name"] for item in content["images"]]
        captions = [item["caption"] for item in content["annotations"]]
    else:
        names = [item["image"] for item in content]
        captions = [item["conversations"][1]["value"] for item in content]
    pictures = [np.asarray(Image.open(data / "images" / name).convert("RGB")) for name in names]
    return np.stack(pictures), captions


def normalise(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] to float [n, 3, h, w]."""
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
    std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - mean) / std


def draw_batch(rng: np.random.Generator, captions: np.ndarray, size: int) -> np.ndarray:
    """Indices of pictures whose captions all differ."""
    candidates = rng.permutation(len(captions))[: 8 * size]
    _, first = np.unique(captions[candidates], return_index=True)
    return candidates[np.sort(first)][:size]


@torch.inference_mode()
def retrieval(model: open_clip.CLIP, tokenizer: open_clip.SimpleTokenizer, data: Path) -> tuple[float, int]:
    """How often a held-out picture's caption is the nearest of all held-out captions; and how many there are."""
    pictures, captions = load_pairs(data, "captions_val.json")
    distinct = sorted(set(captions))
    images = model.encode_image(normalise(pictures), normalize=True)  # [n, d]
    texts = model.encode_text(tokenizer(distinct), normalize=True)  # [distinct, d]
    right = (images @ texts.T).argmax(1) == torch.tensor([distinct.index(text) for text in captions])
    return right.float().mean().item(), len(distinct)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that make_data.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="file to write, .pt")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    pictures, texts = load_pairs(options.data, "captions_train.json")
    captions = np.array(texts)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    tokens = tokenizer(texts)  # [n, context]

    model = open_clip.CLIP(64, VISION, TEXT, quick_gelu=True)
    contrast = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, options.steps, WARMUP, options.lr)
        batch = draw_batch(rng, captions, BATCH)
        image, text, scale = model(normalise(pictures[batch]), tokens[batch])
        loss = contrast(image, text, scale)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            print(f"CLIP step {step + 1}/{options.steps}, loss {loss.item():.3f}", flush=True)

    model.eval()
    score, among = retrieval(model, tokenizer, options.data)
    print(f"CLIP finds the caption of a held-out picture among {among} in {score:.1%} of cases")
    torch.save({"name": "quickstart", "epoch": 1, "state_dict": model.state_dict()}, options.output)


if __name__ == "__main__":
    main()
