"""A .gguf file's vocabulary as a Hugging Face tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from octavo.checkpoint.gguf_file import GgufFile
from octavo.checkpoint.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer
from octavo.errors import CheckpointError
from octavo.log import get_logger

logger = get_logger(__name__)

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # token types

_MAX_PIECE_LEN = 256  # characters; trainers stop far below, and trying all cuts is quadratic

# Special tokens of Phi-3 swallow the whitespace after them, except these.
_PHI3_KEEP_SPACE = frozenset(("<unk>", "<s>", "<|endoftext|>"))


@dataclass(frozen=True, slots=True)
class _Vocab:
    tokens: list[str]
    types: list[int]
    model: str  # "gpt2": byte-level BPE; "llama": SentencePiece BPE
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    add_bos: bool
    add_eos: bool

    def text(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.tokens[token_id]


def hf_tokenizer(file: GgufFile) -> tuple[str, dict[str, Any]] | None:
    """tokenizer.json as text and tokenizer_config.json, or None for a file without a vocabulary.

    Raises:
        CheckpointError: the vocabulary is broken or of a kind that is not supported.
    """
    model = file.string("tokenizer.ggml.model", "none")
    if model in (None, "none", "no_vocab"):
        return None
    if model not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{file.path} has a vocabulary of kind {model!r}; supported are gpt2 (byte-level BPE) "
            f"and llama (SentencePiece BPE). Give a folder with a tokenizer.json as tokenizer."
        )
    pre = _pre_tokenizer(file) if model == "gpt2" else None
    vocab = _read_vocab(file, model, adds_bos=pre.adds_bos if pre else True)
    try:
        tokenizer = _byte_level(file, vocab, pre) if pre else _sentencepiece(file, vocab)
        _add_special_tokens(tokenizer, vocab, file.string("general.architecture") == "phi3")
        _add_template(tokenizer, vocab)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(f"{file.path}: the vocabulary is broken: {error}") from error
    return tokenizer.to_str(), _tokenizer_config(file, vocab)


def _pre_tokenizer(file: GgufFile) -> PreTokenizer:
    name = file.string("tokenizer.ggml.pre")
    if name is None or name == "default":
        logger.warning("%s names no pre-tokenizer; answers may be poor", file.path)
    pre = PRE_TOKENIZERS.get(name or "default")
    if pre is None:
        raise CheckpointError(
            f"{file.path} needs the pre-tokenizer {name!r}; known are {', '.join(PRE_TOKENIZERS)}. "
            f"Give a folder or hub id with the model's tokenizer.json as tokenizer."
        )
    return pre


def _read_vocab(file: GgufFile, model: str, *, adds_bos: bool) -> _Vocab:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens must be a list of strings.")
    types = _numbers(file, "tokenizer.ggml.token_type", len(tokens))
    ids: dict[str, int | None] = {}
    for key in ("bos", "eos", "unknown", "padding"):
        token_id = file.integer(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise CheckpointError(
                f"{file.path}: tokenizer.ggml.{key}_token_id is {token_id}, beyond the vocabulary "
                f"of {len(tokens)}."
            )
        ids[key] = token_id
    if model == "llama" and ids["unknown"] is None and 2 in (types or ()):
        ids["unknown"] = types.index(_UNKNOWN)  # type: ignore[union-attr]
    return _Vocab(
        tokens=_unique(tokens),
        types=types or [1] * len(tokens),
        model=model,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        unk_id=ids["unknown"],
        pad_id=ids["padding"],
        add_bos=file.flag("tokenizer.ggml.add_bos_token", adds_bos),
        add_eos=file.flag("tokenizer.ggml.add_eos_token", False),
    )


def _unique(tokens: list[str]) -> list[str]:
    """Doubled texts (padding of the vocabulary, mostly) get a name of their own, so that ids stay
    what they are.
    """
    if len(set(tokens)) == len(tokens):
        return tokens
    seen: set[str] = set()
    result = []
    for index, token in enumerate(tokens):
        text = f"[doubled {index}]" if token in seen else token
        seen.add(text)
        result.append(text)
    return result


def _numbers(file: GgufFile, key: str, count: int) -> list[Any] | None:
    values = file.metadata.get(key)
    if values is None:
        return None
    if not isinstance(values, np.ndarray) or len(values) != count:
        raise CheckpointError(f"{file.path}: {key} must hold {count} numbers.")
    return list(values.tolist())


def _byte_level(file: GgufFile, vocab: _Vocab, pre: PreTokenizer) -> Tokenizer:
    lines = file.metadata.get("tokenizer.ggml.merges")
    if not isinstance(lines, list):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.merges is missing.")
    merges = []
    for line in lines:
        cut = line.find(" ", 1)
        if cut < 0:
            raise CheckpointError(f"{file.path}: {line!r} in tokenizer.ggml.merges is no pair.")
        merges.append((line[:cut], line[cut + 1 :]))
    ids = {token: index for index, token in enumerate(vocab.tokens)}
    tokenizer = Tokenizer(BPE(vocab=ids, merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, vocab: _Vocab) -> Tokenizer:
    scores = _numbers(file, "tokenizer.ggml.scores", len(vocab.tokens))
    if scores is None:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.scores is missing.")
    ids = {token: index for index, token in enumerate(vocab.tokens)}
    model = BPE(
        vocab=ids,
        merges=_merges_from_scores(ids, scores),
        unk_token=vocab.text(vocab.unk_id),
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    to_space = decoders.Replace("▁", " ")
    steps: list[decoders.Decoder] = [to_space, decoders.ByteFallback(), decoders.Fuse()]
    underline: normalizers.Normalizer = normalizers.Replace(" ", "▁")
    if file.flag("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), underline])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = underline
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_from_scores(ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece stores no merges: any two pieces whose joint text is a piece may merge, best
    score first.
    """
    ranked = []
    for token, index in ids.items():
        if len(token) > _MAX_PIECE_LEN:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[index], ids[left], ids[right], left, right))
    ranked.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in ranked]


def _add_special_tokens(tokenizer: Tokenizer, vocab: _Vocab, is_phi3: bool) -> None:
    added = []
    for token, kind in zip(vocab.tokens, vocab.types, strict=True):
        if kind not in (_UNKNOWN, _CONTROL, _USER_DEFINED) or not token:
            continue
        special = kind != _USER_DEFINED
        rstrip = is_phi3 and special and token not in _PHI3_KEEP_SPACE
        added.append(AddedToken(token, special=special, normalized=False, rstrip=rstrip))
    tokenizer.add_tokens(added)


def _add_template(tokenizer: Tokenizer, vocab: _Vocab) -> None:
    """Put BOS before and EOS after a text, where the file wants that."""
    bos = vocab.text(vocab.bos_id) if vocab.add_bos else None
    eos = vocab.text(vocab.eos_id) if vocab.add_eos else None
    if bos is None and eos is None:
        return
    around = [([bos] if bos else []) + [f"$A:{i}"] + ([eos] if eos else []) for i in (0, 1)]
    tokenizer.post_processor = TemplateProcessing(
        single=around[0],
        pair=around[0] + [part.replace("$A", "$B") for part in around[1]],
        special_tokens=[
            (text, tokenizer.token_to_id(text)) for text in dict.fromkeys((bos, eos)) if text
        ],
    )


def _tokenizer_config(file: GgufFile, vocab: _Vocab) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": vocab.add_bos and vocab.bos_id is not None,
        "add_eos_token": vocab.add_eos and vocab.eos_id is not None,
    }
    for name, token_id in (
        ("bos_token", vocab.bos_id),
        ("eos_token", vocab.eos_id),
        ("unk_token", vocab.unk_id),
        ("pad_token", vocab.pad_id),
    ):
        if token_id is not None:
            config[name] = vocab.tokens[token_id]
    length = file.integer(f"{file.string('general.architecture')}.context_length")
    if length is not None:
        config["model_max_length"] = length
    return config
