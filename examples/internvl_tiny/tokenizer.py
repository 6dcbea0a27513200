"""Vocabulary of InternVL-tiny: a byte-level BPE tokenizer, trained on the questions of the task suite.

Splitting follows Qwen2 (letters with at most one sign before them, single digits, runs of punctuation, white space),
so every digit is a token of its own: a number on a picture and a coordinate of a box are both read digit by digit,
first the coarse digit, then the finer one. Whole-number tokens would make a box about 8 tokens shorter, but each would
need an embedding and share nothing with the digits that the number task teaches. No text normalisation, no BOS:
decoding gives back every string exactly. Printed words are left out of the training text, so that unseen words are
spelled as seen ones are, nearly letter by letter. The default system prompt is in it once per sample, as it is in
training, and takes 6 tokens: one for each piece that punctuation leaves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .tasks import TaskMixture

SYSTEM_PROMPT = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
VOCAB_SIZE = 704
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPELLED = frozenset({"words", "first_letter"})


def build_tokenizer(texts: Iterable[str] | None = None, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train the tokenizer; ids 0-2 are `CHAT_TOKENS` (pad, start, eos), 3-11 `IMAGE_TOKENS`, then bytes, then merges.

    Args:
        texts: training text; special tokens in it only mark boundaries. None takes `default_corpus()`.
        vocab_size: number of ids, at least 268 (12 special tokens and 256 bytes); fewer when the text has no more
            pairs to merge.

    Raises:
        ValueError: `vocab_size` below 268.
    """
    specials = [*CHAT_TOKENS, *IMAGE_TOKENS]
    if vocab_size < 256 + len(specials):
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least {256 + len(specials)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_pieces(default_corpus() if texts is None else texts, specials), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=CHAT_TOKENS[0], eos_token=CHAT_TOKENS[2], model_max_length=2048,
        additional_special_tokens=[CHAT_TOKENS[1], *IMAGE_TOKENS], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def default_corpus(samples: int = 2000, seed: int = 0) -> Iterator[str]:
    """Conversations of the training split as the model reads them, without printed words and without images."""
    mixture = TaskMixture("train", seed)
    for index in range(samples):
        yield from ("system\n", SYSTEM_PROMPT)
        for turn in mixture[index].turns:
            yield from ("user\n", turn.question, "assistant\n")
            if turn.task not in _SPELLED:
                yield turn.answer


def _pieces(texts: Iterable[str], specials: list[str]) -> Iterator[str]:
    """Text between special tokens: no merge may cross one."""
    boundary = re.compile("|".join(map(re.escape, specials)))
    for text in texts:
        yield from filter(None, boundary.split(text))
