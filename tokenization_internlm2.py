"""InternLM2's SentencePiece tokenizer on transformers 5, with the ids and the spacing of the released slow class.

That class, on transformers 4.37.2, cuts the text at the added tokens, and SentencePiece encodes each stretch between
them by itself, so a model with a dummy prefix puts it before every stretch; `<s>` goes in front. Decoding sets added
tokens beyond the SentencePiece model off with spaces, the other special tokens as `convert_tokens_to_string` says.

A checkpoint carries this file only where no `tokenizer.json` gives the same ids (conversion/tokenizers.py decides);
`AutoTokenizer` then needs `trust_remote_code=True`. Two things differ from the released class on purpose. It removed
spaces before punctuation ("a ." became "a.") whatever `clean_up_tokenization_spaces` said; here that flag decides.
And its special tokens mask did not fit its ids.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_sentencepiece import SPIECE_UNDERLINE, SentencePieceBackend
from transformers.utils import is_sentencepiece_available


class InternLM2Tokenizer(SentencePieceBackend):
    """A tokenizer whose ids are those of SentencePiece between added tokens.

    Args:
        vocab_file: The SentencePiece model, `tokenizer.model`.
        unk_token, bos_token, eos_token, pad_token: Special tokens; the defaults are the released ones.
        sp_model_kwargs: Arguments for `SentencePieceProcessor`.
        add_bos_token, add_eos_token: Whether `bos_token` goes in front and `eos_token` at the end.
        legacy: False only for tokenizers of the Llama family that say so: one space before the whole text, unless it
            starts with a special token, instead of the model's dummy prefix before every stretch.
        kwargs: As for any slow tokenizer.

    Raises:
        ImportError: sentencepiece is not installed.
        ValueError: `vocab_file` is missing or no SentencePiece model.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str | None = None,
        unk_token: Any = "<unk>",
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        pad_token: Any = "</s>",
        sp_model_kwargs: dict[str, Any] | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        legacy: bool | None = True,
        **kwargs: Any,
    ) -> None:
        if not is_sentencepiece_available():
            raise ImportError("InternLM2Tokenizer needs sentencepiece: pip install sentencepiece protobuf")
        if vocab_file is None or not Path(vocab_file).is_file():
            raise ValueError(f"InternLM2Tokenizer has no tokenizer.model ({vocab_file}): put it beside this file.")
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        try:
            super().__init__(
                vocab_file=str(vocab_file),
                unk_token=unk_token,
                bos_token=bos_token,
                eos_token=eos_token,
                pad_token=pad_token,
                sp_model_kwargs=sp_model_kwargs or {},
                add_bos_token=add_bos_token,
                add_eos_token=add_eos_token,
                legacy=legacy is not False,
                token_type_ids_pattern="all_zeros",
                **kwargs,
            )
        except RuntimeError as error:  # sentencepiece's, which transformers would take for a tiktoken file
            raise ValueError(f"{vocab_file} is no SentencePiece model: download it again ({error}).") from error

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """The tokens of a text, special ones cut out first unless `split_special_tokens=True`."""
        if self.legacy or not text:
            return super().tokenize(text, **kwargs)
        tokens = super().tokenize(SPIECE_UNDERLINE + text.replace(SPIECE_UNDERLINE, " "), **kwargs)
        special_first = tokens[:1] == [SPIECE_UNDERLINE] and tokens[1:2] and tokens[1] in self.all_special_tokens
        return tokens[1:] if special_first else tokens

    def _affixes(self) -> tuple[list[int], list[int]]:
        return [self.bos_token_id] * bool(self.add_bos_token), [self.eos_token_id] * bool(self.add_eos_token)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Puts the beginning and end tokens around one text, or around two; nothing goes between two."""
        before, after = self._affixes()
        return before + list(token_ids_0) + list(token_ids_1 or []) + after

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 where `build_inputs_with_special_tokens` puts a special token, else 0."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        before, after = self._affixes()
        return [1] * len(before) + [0] * (len(token_ids_0) + len(token_ids_1 or [])) + [1] * len(after)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of tokens. A space precedes each run of text or special tokens that ends in a special token."""
        special, text, after_special = set(self.all_special_tokens), "", False
        held: list[str] = []
        for token in tokens:
            if token in special:
                gap = " " if self.legacy and not after_special else ""
                text, held = text + gap + self.sp_model.decode(held) + token, []
            else:
                held.append(token)
            after_special = token in special
        text += self.sp_model.decode(held)
        added = not self.legacy and tokens and tokens[0].startswith(SPIECE_UNDERLINE)  # the space from `tokenize`
        return text[1:] if added else text

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        tokens = self.convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens)
        special = set(self.all_special_tokens)
        # Added tokens that the base class of transformers 4 set apart: ordinary ones, and extra ones beyond the model.
        apart = {t for t in self._added_tokens_encoder if t not in special}
        apart |= {t for t in map(str, self._extra_special_tokens) if self.convert_tokens_to_ids(t) >= self.vocab_size}
        clean = clean_up_tokenization_spaces
        clean = self.clean_up_tokenization_spaces if clean is None else clean
        groups = [(is_apart, list(group)) for is_apart, group in groupby(tokens, key=apart.__contains__)]
        parts: list[str] = []
        for i, (is_apart, group) in enumerate(groups):
            if is_apart:
                parts += group
                continue
            text = self.convert_tokens_to_string(group)
            text = self.clean_up_tokenization(text) if clean else text
            parts += [text] if text or i == len(groups) - 1 else []
        return (" " if spaces_between_special_tokens else "").join(parts)

    def _save_pretrained(
        self,
        save_directory: str,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        path = Path(file_names[0])  # tokenizer_config.json, where the base class leaves these two out
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)


InternLM2Tokenizer.register_for_auto_class()
