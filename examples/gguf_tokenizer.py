"""The tokenizer that a GGUF file describes, built with `tokenizers`: byte-level BPE (`gpt2`), or
SentencePiece BPE by scores (`llama`)."""

from collections.abc import Callable
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

# How each pre-tokenizer splits a text before bytes are merged; digits as Unicode's \p{N}.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "qwen2": _CONTRACTIONS + _WORDS % "",
    "llama-bpe": _CONTRACTIONS + _WORDS % "{1,3}",
}
SPACE = "\u2581"  # SentencePiece's

Get = Callable[..., Any]  # metadata by name


def read_tokenizer(get: Get) -> Tokenizer:
    """The tokenizer of a file's metadata; it adds no start token.

    Raises:
      ValueError: a kind of tokenizer that is not known here.
    """
    kind = get("tokenizer.ggml.model")
    makers = {"gpt2": _byte_level, "llama": _sentence_piece}
    if kind not in makers:
        raise ValueError(f"tokenizer {kind!r}: it must be one of {', '.join(makers)}")
    tokens = get("tokenizer.ggml.tokens")
    tokenizer = makers[kind](get, tokens)
    for wanted, special in ((gguf.TokenType.CONTROL, True), (gguf.TokenType.USER_DEFINED, False)):
        kinds = get("tokenizer.ggml.token_type")
        found = [token for token, kind in zip(tokens, kinds, strict=True) if kind == wanted]
        added = [AddedToken(token, special=special, normalized=False) for token in found]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return tokenizer


def _byte_level(get: Get, tokens: list[str]) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in get("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pre = get("tokenizer.ggml.pre")
    whole = pre == "llama-bpe"  # words of the vocabulary are taken without merging
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole))
    if pre in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    elif pre == "smollm":
        split = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        raise ValueError(f"pre-tokenizer {pre!r}: it must be smollm or one of {', '.join(SPLITS)}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(get: Get, tokens: list[str]) -> Tokenizer:
    """Pairs are merged in the order of their result's score; bytes stand in for what is unknown."""
    scores = get("tokenizer.ggml.scores")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [(-score, cut) for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
    merges.sort(key=lambda merge: merge[0])  # stable: of equal scores the first token
    model = models.BPE(vocabulary, [cut for _, cut in merges], byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    prefix = get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer
