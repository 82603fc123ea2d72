"""Text encoders with random weights, small enough to be made by a test."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

WORDS = ["<pad>", "</s>", "<unk>", "<s>", "a", "red", "blue", "square", "moves", "left", *"0123456789"]


@functools.cache
def save_encoder(folder: Path, kind: str) -> str:
    """A tiny encoder with random weights and a tokenizer of whole words, as ``save_pretrained`` leaves them.

    Args:
        kind: "t5"; "clip", of 10 tokens; or "clip-projection", of 77 tokens, with the projection of its pooled output.
    """
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "$A </s>" if kind == "t5" else "<s> $A </s>"
    words.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 1), ("<s>", 3)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    )
    torch.manual_seed(0)
    size = {"vocab_size": len(WORDS), "num_layers": 2, "num_heads": 2}
    if kind == "t5":
        config = transformers.T5Config(**size, d_model=12, d_kv=6, d_ff=24, pad_token_id=0, eos_token_id=1)
        model = transformers.T5EncoderModel(config)
    else:
        config = transformers.CLIPTextConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=10 if kind == "clip" else 77,
            projection_dim=16,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=3,
        )
        model = (transformers.CLIPTextModel if kind == "clip" else transformers.CLIPTextModelWithProjection)(config)
    model.save_pretrained(folder / kind)
    tokenizer.save_pretrained(folder / kind)
    return str(folder / kind)
