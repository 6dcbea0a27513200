"""Released tokenizers as files that transformers 5.11 and later load, with the same ids.

The released class decides what the ids are: it cuts text at the added tokens as transformers' slow tokenizers do, and
SentencePiece encodes each stretch between them by itself (tokenization_internlm2.py says it in full). Which files say
the same to transformers 5 depends on what a repository has:

- "kept": `tokenizer.json` (but for InternLM2 and InternLM3, whose released class is the slow one), or Qwen's
  vocab.json and merges.txt. They are copied to the byte.
- "fast": a `tokenizer.json` built from `tokenizer.model`. It is written only if its ids and decoded texts are those of
  SentencePiece for every piece of the vocabulary, around every added token and for random mixtures. It needs no
  remote code.
- "sentencepiece": where they are not (unigram models, pieces that SentencePiece takes apart again, user-defined pieces
  after a dummy prefix, Phi-3, whose slow class puts a space token before a text that starts with `<|user|>`):
  `tokenizer.model` with tokenization_internlm2.py, which needs `trust_remote_code=True`.

Deliberately not reproduced by "fast": InternLM2 gives unused pieces of its model new names (`[UNUSED_TOKEN_146]` is
`<|im_start|>`), and its slow class reads the old names in any text as those control tokens; here they are characters
(`TokenizerReport.renamed`). It decodes added tokens without spaces around them. After a token that swallows spaces,
U+001C to U+001F are no spaces. Which chat template is right is for the caller to say.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .. import tokenization_internlm2
from ..prompting_internvl import TokenizerError
from ..tokenization_internlm2 import InternLM2Tokenizer

MODEL, FAST, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
ADDED, SPECIAL, TEMPLATE = "added_tokens.json", "special_tokens_map.json", "chat_template.jinja"
BYTE_LEVEL = ("vocab.json", "merges.txt")
FILES = (FAST, MODEL, *BYTE_LEVEL, CONFIG, ADDED, SPECIAL, TEMPLATE)

_SLOW_CLASSES = ("InternLM2Tokenizer", "InternLM3Tokenizer")  # released as remote code, without a fast class
# transformers 5 builds Llama's class from the vocabulary, past what tokenizer.json says; 4 does not know the second.
_MISREAD_CLASSES = (*_SLOW_CLASSES, "LlamaTokenizer", "TokenizersBackend")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Fields of tokenizer_config.json that are written anew, or that only slow classes read.
_DROPPED = {*_NAMED, *"added_tokens_decoder additional_special_tokens add_bos_token add_eos_token".split()}
_DROPPED |= {*"add_prefix_space auto_map backend decode_with_prefix_space from_slow is_local legacy".split()}
_DROPPED |= {*"name_or_path sp_model_kwargs special_tokens_map_file tokenizer_class tokenizer_file".split()}
_DROPPED |= {*"use_fast vocab_file".split()}
_SPACE = "▁"  # U+2581, which SentencePiece writes for a space
_NORMAL, _UNKNOWN, _USER_DEFINED = 1, 2, 4  # types of pieces in sentencepiece_model.proto
# fmt: off
_TEXTS = (
    "", " ", "  ", "   ", "\n", "\n\n", "\t", " \n ", "\r\n", "a", " a", "a ", "  a  ", "\na", "a\n", "\u00a0a\u3000",
    "Hello, world!", "two  spaces   three", "x = 1\n    y\t= 2\n\n", "0123456789 12345 3.14159", "1 000 000", "don't",
    "你好，世界。", "こんにちは 世界", "안녕하세요", "Привет, мир", "مرحبا", "é e\u0301 ﬁ ① Ａ", "数字123和text混合",
    "😀", "👩\u200d👩\u200d👧 🇨🇳", "\x00", "a\x00b\x7f", "\u200b\ufeff", "\ue000\U0010ffff", "▁", "a▁b ▁ c", "<0x0A>",
    "<s", "<|im", "< img >", "<<img>>", "http://a.b/c?d=e&f=%20", "```python\nprint('hi')\n```", "a" * 40, " " * 40,
)
# fmt: on


@dataclass(frozen=True)
class TokenizerReport:
    """What `make_loadable` wrote.

    Attributes:
        kind: "kept", "fast" or "sentencepiece" (see the module).
        files: Names of the files in the target folder.
        checked: Number of texts that were compared with SentencePiece; 0 for "kept".
        reason: Why `tokenizer.model` did not become a `tokenizer.json`, else "".
        renamed: Names of pieces that the released class reads as control tokens and that are plain characters here.
    """

    kind: str
    files: tuple[str, ...] = ()
    checked: int = 0
    reason: str = ""
    renamed: tuple[str, ...] = ()

    @property
    def needs_remote_code(self) -> bool:
        """Whether `AutoTokenizer` needs `trust_remote_code=True`."""
        return self.kind == "sentencepiece"


def make_loadable(
    source: str | Path, target: str | Path, config: dict[str, Any] | None = None, *, chat_template: str | None = None
) -> TokenizerReport:
    """Writes tokenizer files for transformers >= 5.11 that give the ids of the released tokenizer.

    transformers 4 reads them too, but for "sentencepiece" and, before 4.40, tokenizers that say `legacy: false`. The
    target gets all of them or, on an error, none. The largest vocabularies take about half a minute.

    Args:
        source: Folder of a released checkpoint; only its tokenizer files are read.
        target: An existing folder without tokenizer files.
        config: The checkpoint's `config.json`. It tells ids beyond the embedding table, and the class of a tokenizer
            whose own configuration does not name one (without it: InternLM2's).
        chat_template: The right template. It replaces the released one, which otherwise stays: several releases carry
            that of their language model, with its system prompt.

    Raises:
        TokenizerError: there is no tokenizer, a file is damaged, files contradict each other, or `target` is not free.
        ImportError: sentencepiece or protobuf is needed and not installed.
    """
    source, target = Path(source), Path(target)
    if not target.is_dir():
        raise TokenizerError(f"{target} is no folder: create it first.")
    if taken := [name for name in FILES if (target / name).exists()]:
        raise TokenizerError(f"{target} already has {', '.join(taken)}: give a folder without tokenizer files.")
    released = _Release(source, config or {})
    with tempfile.TemporaryDirectory(dir=target, prefix=".tokenizer.") as temporary:
        folder = Path(temporary)
        convert = released.has(MODEL) and (released.class_name in _SLOW_CLASSES or not released.has(FAST))
        report = (_convert if convert else _keep)(released, folder)
        _write_template(released, folder, chat_template)
        files = sorted(path.name for path in folder.iterdir())
        for name in files:
            (folder / name).replace(target / name)
    return replace(report, files=tuple(files))


# ------------------------------------------------------------------------------------------------ what a release says


@dataclass
class _Release:
    """The tokenizer files of a released checkpoint, and what they say."""

    folder: Path
    model_config: dict[str, Any]
    config: dict[str, Any] = field(init=False)
    special: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.config, self.special = self.read(CONFIG), self.read(SPECIAL)
        if not (self.has(FAST) or self.has(MODEL) or all(map(self.has, BYTE_LEVEL))):
            raise TokenizerError(
                f"{self.folder} has no tokenizer: looked for {FAST}, {MODEL} and {' with '.join(BYTE_LEVEL)}. "
                "Copy the tokenizer files of the released repository into it."
            )

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def read(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; {} if there is no such file."""
        if not self.has(name):
            return {}
        path = self.folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TokenizerError(f"{path} is not valid JSON: download it again ({error}).") from error
        if not isinstance(value, dict):
            raise TokenizerError(f"{path} holds a {type(value).__name__}, not an object: download it again.")
        return value

    @property
    def llm_config(self) -> dict[str, Any]:
        return self.model_config.get("llm_config") or self.model_config.get("text_config") or {}

    @cached_property
    def class_name(self) -> str:
        """The tokenizer's class, without "Fast"."""
        auto_map = self.config.get("auto_map") or {}
        references = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
        remote = next((reference.rpartition(".")[2] for reference in references or [] if reference), "")
        architecture = (self.llm_config.get("architectures") or ["InternLM2ForCausalLM"])[0]
        guess = "InternLM2Tokenizer" if architecture == "InternLM2ForCausalLM" else "LlamaTokenizer"
        return (self.config.get("tokenizer_class") or remote or guess).removesuffix("Fast")

    @cached_property
    def legacy(self) -> bool:
        """False for Llama's newer way: one space before the whole text, not the model's dummy prefix everywhere."""
        return self.config.get("legacy") is not False

    @cached_property
    def named(self) -> dict[str, str | None]:
        """The named special tokens, with the class's defaults."""
        found: dict[str, str | None] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        found["pad_token"] = "</s>" if self.class_name == "InternLM2Tokenizer" else None
        for values in (self.special, self.config):
            found |= {key: _content(values[key]) for key in _NAMED if key in values}
        return found

    @cached_property
    def extra(self) -> list[str]:
        """The special tokens without a name, in the release's order; transformers 5 has another word for them."""
        keys = ("additional_special_tokens", "extra_special_tokens")
        lists = [values.get(key) for values in (self.config, self.special) for key in keys]
        return [_content(token) for token in next((tokens for tokens in lists if isinstance(tokens, list)), [])]

    def end(self, name: str) -> str | None:
        """The `bos` or `eos` token if every text gets it, else None."""
        return self.named[f"{name}_token"] if self.config.get(f"add_{name}_token", name == "bos") else None

    @cached_property
    def added(self) -> dict[int, AddedToken]:
        """The added tokens by id, from `tokenizer_config.json` and `added_tokens.json`, which must agree."""
        tokens = {int(i): _added(**token) for i, token in (self.config.get("added_tokens_decoder") or {}).items()}
        special = {*self.extra, *self.named.values()}
        for content, index in self.read(ADDED).items():
            tokens.setdefault(index, _added(content, special=content in special))
            if tokens[index].content != content:
                raise self.contradiction(ADDED, content, index, f"is {tokens[index].content!r}")
        ids: dict[str, int] = {}
        for index, token in sorted(tokens.items()):
            if ids.setdefault(token.content, index) != index:
                raise self.contradiction(CONFIG, token.content, index, f"has id {ids[token.content]} too")
        return dict(sorted(tokens.items()))

    def contradiction(self, name: str, content: str, index: int, fact: str) -> TokenizerError:
        return TokenizerError(
            f"{self.folder / name} gives {content!r} id {index}, which {fact}: take all tokenizer files from one "
            "revision of the repository."
        )

    def check_embeddings(self, ids: Iterable[int]) -> None:
        """Refuses ids that the model has no embedding for."""
        size, last = self.llm_config.get("vocab_size"), max(ids, default=-1)
        if size is not None and last >= size:
            raise TokenizerError(
                f"{self.folder} has a token with id {last}, but config.json says vocab_size {size}: the tokenizer "
                "files belong to another checkpoint; copy those of this one."
            )


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _added(content: str, special: bool = True, **flags: Any) -> AddedToken:
    """An added token that is looked for in the text as it stands, as slow tokenizers do."""
    kept = {key: bool(flags.get(key)) for key in ("lstrip", "rstrip", "single_word")}
    return AddedToken(content, special=special, normalized=False, **kept)


# --------------------------------------------------------------------------------------------------- writing the files


def _keep(released: _Release, folder: Path) -> TokenizerReport:
    """Copies the files; only `tokenizer_config.json` changes, where a version of transformers would misread it."""
    _check_fast(released)
    config = {key: value for key, value in released.config.items() if key != "auto_map"}
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 wants a mapping there
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    unnamed = "auto_map" in released.config or not config.get("tokenizer_class")
    if released.has(FAST) and (unnamed or released.class_name in _MISREAD_CLASSES):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
        config.setdefault("clean_up_tokenization_spaces", False)
    for name in (FAST, MODEL, *BYTE_LEVEL, ADDED, SPECIAL):
        if released.has(name):
            shutil.copyfile(released.folder / name, folder / name)
    _dump(folder / CONFIG, config)
    return TokenizerReport("kept")


def _check_fast(released: _Release) -> None:
    """Refuses a `tokenizer.json` that is damaged or disagrees with the files beside it."""
    path = released.folder / FAST
    if released.has(FAST):
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library has no narrower one
            raise TokenizerError(f"{path} cannot be read: download it again ({error}).") from error
        for index, token in released.added.items():
            if (found := tokenizer.token_to_id(token.content)) != index:
                raise released.contradiction(ADDED, token.content, index, f"has id {found} in {FAST}")
    released.check_embeddings(released.added)


def _convert(released: _Release, folder: Path) -> TokenizerReport:
    """Writes a `tokenizer.json` if it can be shown to agree with `tokenizer.model`, else the slow class."""
    pieces = _Pieces.read(released.folder / MODEL)
    tokens = _numbered(released, pieces)
    released.check_embeddings(tokens)
    renamed = {i for i, token in tokens.items() if i < len(pieces) and pieces[i].piece != token.content}
    texts = list(_battery(pieces, [token.content for token in tokens.values()], renamed))
    slow_folder, fast_folder = folder / "slow", folder / "fast"
    _write_slow(released, pieces, tokens, slow_folder)
    slow = InternLM2Tokenizer.from_pretrained(slow_folder)
    try:
        _write_fast(released, pieces, tokens, fast_folder)
        reason = _difference(PreTrainedTokenizerFast.from_pretrained(fast_folder), slow, texts)
    except _NotConvertible as error:
        reason = str(error)
    for path in sorted((slow_folder if reason else fast_folder).iterdir()):
        path.replace(folder / path.name)
    shutil.rmtree(slow_folder)
    shutil.rmtree(fast_folder, ignore_errors=True)
    if reason:
        return TokenizerReport("sentencepiece", checked=len(texts), reason=reason)
    read_as_tokens = [pieces.text(i) for i in sorted(renamed) if i in slow.sp_model.encode(pieces.text(i))]
    return TokenizerReport("fast", checked=len(texts), renamed=tuple(read_as_tokens))


def _write_slow(released: _Release, pieces: _Pieces, tokens: dict[int, AddedToken], folder: Path) -> None:
    code, name = Path(tokenization_internlm2.__file__), InternLM2Tokenizer.__name__
    auto_map = {"AutoTokenizer": [f"{code.stem}.{name}", None]}
    _write_common(released, pieces, tokens, folder, tokenizer_class=name, auto_map=auto_map, legacy=released.legacy)
    shutil.copyfile(code, folder / code.name)


def _write_fast(released: _Release, pieces: _Pieces, tokens: dict[int, AddedToken], folder: Path) -> None:
    content = json.loads(_build(released, pieces, tokens).to_str())
    merges = content["model"]["merges"]
    if not any(" " in part for pair in merges for part in pair):
        content["model"]["merges"] = [" ".join(pair) for pair in merges]  # all that tokenizers < 0.20 reads
    _write_common(released, pieces, tokens, folder, tokenizer_class="PreTrainedTokenizerFast")
    _dump(folder / FAST, content)


def _write_common(
    released: _Release, pieces: _Pieces, tokens: dict[int, AddedToken], folder: Path, **fields: Any
) -> None:
    """Writes the files that both kinds have; `fields` go into `tokenizer_config.json`."""
    folder.mkdir()
    config = {key: value for key, value in released.config.items() if key not in _DROPPED}
    if isinstance(config.get("extra_special_tokens"), list):
        del config["extra_special_tokens"]
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    config = {"clean_up_tokenization_spaces": False, **config, **released.named, **fields}
    config |= {
        "add_bos_token": released.end("bos") is not None,
        "add_eos_token": released.end("eos") is not None,
        "added_tokens_decoder": {str(i): {key: getattr(t, key) for key in flags} for i, t in tokens.items()},
        "additional_special_tokens": released.extra,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    special = {key: value for key, value in released.named.items() if value is not None}
    shutil.copyfile(released.folder / MODEL, folder / MODEL)
    _dump(folder / CONFIG, config)
    _dump(folder / SPECIAL, {**special, "additional_special_tokens": released.extra})
    _dump(folder / ADDED, {token.content: i for i, token in tokens.items() if i >= len(pieces)})


def _write_template(released: _Release, folder: Path, chat_template: str | None) -> None:
    if chat_template is not None:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config.pop("chat_template", None)
        _dump(folder / CONFIG, config)
        (folder / TEMPLATE).write_text(chat_template, encoding="utf-8")
    elif released.has(TEMPLATE):
        shutil.copyfile(released.folder / TEMPLATE, folder / TEMPLATE)


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------- from SentencePiece to BPE


class _NotConvertible(Exception):
    """The `tokenizers` library has no counterpart of something in the model."""


class _Pieces(list):
    """The pieces of a SentencePiece model by id; `proto` is the whole model."""

    proto: Any

    @classmethod
    def read(cls, path: Path) -> _Pieces:
        try:
            import sentencepiece
            from google.protobuf.message import DecodeError
            from sentencepiece import sentencepiece_model_pb2
        except ImportError as error:
            raise ImportError(f"Reading {path} needs two packages: pip install sentencepiece protobuf") from error
        data, proto = path.read_bytes(), sentencepiece_model_pb2.ModelProto()
        try:
            proto.ParseFromString(data)
            sentencepiece.SentencePieceProcessor(model_proto=data)
        except (DecodeError, RuntimeError):
            proto.Clear()
        if not proto.pieces:
            kind = "a Git LFS pointer" if data.startswith(b"version https://git-lfs") else "no SentencePiece model"
            raise TokenizerError(f"{path} is {kind} ({len(data)} bytes): download the file itself again.")
        pieces = cls(proto.pieces)
        pieces.proto = proto
        return pieces

    def text(self, index: int) -> str:
        """The text of a piece, as one would type it."""
        return self[index].piece.replace(_SPACE, " ")

    def merges(self) -> list[tuple[str, str]]:
        """Every way to join two pieces to a third, in the order of its score, which SentencePiece goes by."""
        score = {piece.piece: piece.score for piece in self if piece.type == _NORMAL}
        found = []
        for name in score:
            found += [(name[:i], name[i:]) for i in range(1, len(name)) if name[:i] in score and name[i:] in score]
        return sorted(found, key=lambda pair: -score["".join(pair)])


def _numbered(released: _Release, pieces: _Pieces) -> dict[int, AddedToken]:
    """All added tokens by id: those with an id, then special tokens that only have a name, as slow classes do.

    Raises:
        TokenizerError: ids beyond the model leave a gap, or a token is a piece with another id.
    """
    tokens = dict(released.added)
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    for index, token in tokens.items():
        if (piece := ids.get(token.content, index)) != index and piece not in tokens:
            raise released.contradiction(CONFIG, token.content, index, f"is piece {piece} of {MODEL}")
    beyond = [index for index in tokens if index >= len(pieces)]
    if gaps := sorted({*range(len(pieces), max(beyond, default=0))} - {*beyond}):
        raise TokenizerError(
            f"{released.folder / ADDED} gives {tokens[beyond[-1]].content!r} id {beyond[-1]}, but {MODEL} ends at id "
            f"{len(pieces) - 1} and no token has id {gaps[0]}: take both files from one revision of the repository."
        )
    known = {token.content for token in tokens.values()}
    for content in dict.fromkeys([*released.named.values(), *released.extra]):
        if content and content not in known:
            free = max(len(pieces), *(index + 1 for index in tokens))
            tokens[ids.get(content, free)] = _added(content)
    return dict(sorted(tokens.items()))


def _build(released: _Release, pieces: _Pieces, tokens: dict[int, AddedToken]) -> Tokenizer:
    """A `tokenizers` tokenizer for a SentencePiece BPE model; the comparison with that shows whether it is the same.

    Raises:
        _NotConvertible: the model is no BPE model, or writes spaces otherwise than in front of words.
    """
    trainer, spec = pieces.proto.trainer_spec, pieces.proto.normalizer_spec
    if trainer.model_type != trainer.BPE or trainer.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise _NotConvertible(f"{MODEL} is no BPE model with spaces in front of words")
    names = [tokens[i].content if i in tokens else piece.piece for i, piece in enumerate(pieces)]
    unknown = next(names[i] for i, piece in enumerate(pieces) if piece.type == _UNKNOWN)
    vocabulary, fallback = {name: i for i, name in enumerate(names)}, trainer.byte_fallback
    model = models.BPE(vocabulary, pieces.merges(), unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
    tokenizer = Tokenizer(model)
    _set_spaces(tokenizer, spec, released.legacy, [decoders.ByteFallback()] if fallback else [])
    user_defined = {i: _added(p.piece, special=False) for i, p in enumerate(pieces) if p.type == _USER_DEFINED}
    added = user_defined | tokens
    tokenizer.add_tokens([added[index] for index in sorted(added)])
    if wrong := [token.content for i, token in added.items() if tokenizer.token_to_id(token.content) != i]:
        raise _NotConvertible(f"{wrong[0]!r} gets another id")
    bos, eos = ([token] if (token := released.end(name)) else [] for name in ("bos", "eos"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", "$B:1", *(f"{token}:1" for token in eos)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*bos, *eos}],
    )
    return tokenizer


def _set_spaces(tokenizer: Tokenizer, spec: Any, legacy: bool, fallback: list[Any]) -> None:
    """Sets what happens to spaces before pieces are looked for, and its reverse in decoding."""
    before_each = legacy and spec.add_dummy_prefix
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(_SPACE)] if before_each else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    if not legacy:
        # Metaspace adds no space where one stands already. So the first step, which sees none left, puts in a real
        # one, and the second writes it as the others.
        first = pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False)
        second = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, second])
    strip = [decoders.Strip(" ", 1, 0)] if before_each or not legacy else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), *fallback, decoders.Fuse(), *strip])


# ----------------------------------------------------------------------------------------------------------- the proof


def _battery(pieces: _Pieces, added: list[str], renamed: set[int]) -> Iterator[str]:
    """The texts to compare; names of pieces that an added token has taken over are left out."""
    surfaces = [pieces.text(i) for i in range(len(pieces)) if i not in renamed]
    yield from _TEXTS
    yield from surfaces
    for token in added:
        for text in ("a", " ", "  ", "\n", " a ", "文", "😀"):
            yield from (token + text, text + token, text + token + text, token + text + token)
        yield from (token + other for other in added)
    for text in sorted({surface[0] for surface in surfaces if len(surface) == 2 and surface[0] == surface[1]}):
        yield from (text * n for n in range(2, 70))  # where the order of equally good joins would show
    chance = random.Random(0)
    fragments = [text for text in surfaces if not set(text) & set("\x1c\x1d\x1e\x1f")]
    for _ in range(2000):
        kinds = chance.choices((fragments, _TEXTS, added or _TEXTS, " \n0a"), (6, 2, 2, 2), k=chance.randint(2, 12))
        yield "".join(chance.choice(kind) for kind in kinds)


def _reference(slow: InternLM2Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of the released class without its ends; texts without added tokens are left to SentencePiece alone."""
    added = re.compile("|".join(map(re.escape, slow.get_added_vocab())))
    whole = [text for text in texts if slow.legacy and not added.search(text)]
    ids = dict(zip(whole, slow.sp_model.encode(whole), strict=True))
    return [ids[t] if t in ids else slow.convert_tokens_to_ids(slow.tokenize(t)) for t in texts]


def _difference(fast: Any, slow: InternLM2Tokenizer, texts: list[str]) -> str:
    """The first text whose ids, or whose text decoded from ids without added tokens, differ; "" if there is none."""
    reference, added = _reference(slow, texts), set(slow.get_added_vocab().values())
    decoded = fast.backend_tokenizer.decode_batch(reference, skip_special_tokens=False)
    for text, ids, plain, back in zip(texts, fast(texts)["input_ids"], reference, decoded, strict=True):
        expected = slow.build_inputs_with_special_tokens(plain)
        if ids != expected:
            return f"{text[:40]!r} has ids {expected[:12]} in SentencePiece and {ids[:12]} in {FAST}"
        if added.isdisjoint(plain) and back != slow.convert_tokens_to_string(slow.convert_ids_to_tokens(plain)):
            return f"the ids {plain[:12]} of {text[:40]!r} are decoded otherwise than by SentencePiece"
    return ""
