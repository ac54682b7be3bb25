"""Small tokenizers of the two common kinds, built on the spot."""

from __future__ import annotations

import functools

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

CORPUS = [
    "the quick brown fox jumps over the lazy dog, don't you think? I'll say so.",
    "def main(argv):\n    return [x ** 2 for x in range(10)]  # comment\n\n\tprint('hello')",
    "naïve café — 你好世界 — Привет мир — 🎉👍🏽 — 1234567890",
    "hello hello world world the the there then this that",
]
SPECIAL = ["<s>", "</s>", "<|user|>"]


@functools.cache
def byte_level_json() -> str:
    """Byte-level BPE; `</s>` and friends are special, `[tool]` is an ordinary added token."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("[tool é]", normalized=False)])
    return tokenizer.to_str()


@functools.cache
def sentencepiece_json() -> str:
    """BPE over ▁ with byte fallback, as Llama 2 and Mistral have it."""
    pieces = ["<unk>", *SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz.,'"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "t"), ("h", "e"), ("l", "l")]
    merges += [("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "▁")]
    pieces += [left + right for left, right in merges]
    model = BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return tokenizer.to_str()
