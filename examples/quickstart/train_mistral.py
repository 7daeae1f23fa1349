"""Train a tiny Mistral with transformers on written maps, and save it as a Hugging Face folder.

Its tokenizer is trained first, with sentencepiece, in the form of Mistral's v3: the same control tokens, byte fallback,
one token a digit. A document is laid out as mmcore's conversation templates lay out a picture and its text, with the
sixteen characters of a map where the sixteen image embeddings will be:

    plain               <s> map caption </s>
    mistral_instruct    <s>[INST] map question [/INST] answer </s>[INST] question [/INST] answer </s>
"""

import argparse
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from make_data import BLANK
from schedule import learning_rate
from transformers import MistralConfig, MistralForCausalLM
from transformers.utils import logging

VOCAB = 384  # 6 special pieces, 256 bytes, 122 of the texts; a multiple of 128 needs no padding
BOS, EOS, INST, INST_END = 1, 2, 3, 4
IGNORE_INDEX = -100
WARMUP = 20  # steps


def texts(documents: list[dict[str, Any]]) -> Iterator[str]:
    for document in documents:
        if "caption" in document:
            yield document["caption"]
        for turn in document.get("turns", []):
            yield from turn


def train_tokenizer(documents: list[dict[str, Any]]) -> bytes:
    """A SentencePiece model, serialised."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts(documents),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]", "[/INST]"],
        user_defined_symbols=[BLANK],
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def encode(document: dict[str, Any], tokenizer: sentencepiece.SentencePieceProcessor) -> tuple[list[int], list[int]]:
    """Tokens of a document, and labels: the caption or the answers, each with its end; IGNORE_INDEX elsewhere.

    Label i is token i itself; the model shifts.
    """
    cells = [tokenizer.piece_to_id(cell) for cell in document["map"]]
    parts: list[tuple[list[int], bool]] = [([BOS], False)]
    if "caption" in document:
        parts += [(cells, False), ([*tokenizer.encode(document["caption"]), EOS], True)]
    for index, (question, answer) in enumerate(document.get("turns", [])):
        asked = [INST, *(() if index else cells), *tokenizer.encode(question), INST_END]
        parts += [(asked, False), ([*tokenizer.encode(answer), EOS], True)]
    tokens = [token for ids, _ in parts for token in ids]
    labels = [token if learned else IGNORE_INDEX for ids, learned in parts for token in ids]
    return tokens, labels


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """int64 [len(rows), longest], filled on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def loss_of(model: MistralForCausalLM, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the labelled positions; logits are computed at no others.

    No padding mask: the padding stands on the right, where causal attention never looks from a labelled position.
    """
    hidden = model.model(tokens).last_hidden_state[:, :-1]  # [b, s - 1, h]
    wanted = labels[:, 1:]
    learned = wanted != IGNORE_INDEX
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[learned]), wanted[learned])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that make_data.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, replaced if it exists")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    lines = (options.data / "text_train.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines]
    proto = train_tokenizer(documents)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=proto)
    examples = [encode(document, tokenizer) for document in documents]

    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            sliding_window=None,
            initializer_range=0.08,  # the usual 0.02 is for wide models: at width 128 it halves the speed of learning
            bos_token_id=BOS,
            eos_token_id=EOS,
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, options.steps, WARMUP, options.lr)
        batch = [examples[index] for index in rng.choice(len(examples), options.batch_size, replace=False)]
        loss = loss_of(model, pad([row[0] for row in batch], EOS), pad([row[1] for row in batch], IGNORE_INDEX))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            print(f"Mistral step {step + 1}/{options.steps}, loss {loss.item():.3f}", flush=True)

    logging.disable_progress_bar()  # one file in no time
    shutil.rmtree(options.output, ignore_errors=True)
    model.config.use_cache = True
    model.save_pretrained(options.output)
    (options.output / "tokenizer.model").write_bytes(proto)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (options.output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
