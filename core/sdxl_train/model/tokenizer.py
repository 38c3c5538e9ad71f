"""CLIP's byte-pair tokenizer and the packing of a text into chunks of 77 ids. Needs neither torch nor transformers."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from sdxl_train.atomic import atomic_file
from sdxl_train.errors import CheckpointError, DataError

START_ID = 49406
END_ID = 49407
CHUNK_LENGTH = 77
CHUNK_CONTENT = 75
TE1_PADDING_ID = END_ID
TE2_PADDING_ID = 0

CACHE_FOLDERS = ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k")
_BASE_FOLDERS = ("tokenizer", "tokenizer_2")

_START, _END = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"
_MAX_FILE_BYTES = 32 * 2**20

# CLIP's rule for what is a word: contractions, runs of letters, single digits, runs of anything else.
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


# The same for ASCII; Python's own module does not know \p{L}.
_PLAIN_WORDS = re.compile(r"""'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\s0-9A-Za-z]+""")
_PLAIN_TEXT = re.compile(r"[ -~\t\n\r]*")
_MAX_WORDS = 200_000  # that are remembered


class PromptTokenizer:
    """CLIP's vocabulary, which both of SDXL's text encoders share."""

    def __init__(self) -> None:
        vocabulary, merges = packaged_vocabulary()
        model = models.BPE(
            vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix=_END_OF_WORD, unk_token=_END, fuse_unk=False
        )
        self._tokenizer = Tokenizer(model)
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._word_counts: dict[str, int] = {}
        self._tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (_START, _END)])

    def content_ids(self, text: str) -> list[int]:
        """All ids of the text, without start and end marker, not cut. Parentheses and colons are text.

        Raises:
            DataError: the text is not valid Unicode.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError(f"a text holds half a surrogate pair, which is no character: {text[:100]!r}") from error

    def count(self, text: str) -> int:
        """How many ids `content_ids` gives, some ten times faster for ASCII texts: words are tokenised alone, and each only once.

        Raises:
            DataError: the text is not valid Unicode.
        """
        if not _PLAIN_TEXT.fullmatch(text) or _START[:2] in text:
            return len(self.content_ids(text))
        total = 0
        for word in _PLAIN_WORDS.findall(text.lower()):
            count = self._word_counts.get(word)
            if count is None:
                count = len(self.content_ids(word))
                if len(self._word_counts) < _MAX_WORDS:
                    self._word_counts[word] = count
            total += count
        return total

    def tokenize(self, text: str, max_token_length: int) -> tuple[list[list[int]], list[list[int]], int]:
        """Packs a text into n = max_token_length / 75 chunks: start, 75 ids of content, end, padding.

        Returns:
            ids for TE1 [n, 77], ids for TE2 [n, 77], and the number of content ids before the cut to 75 n.
        """
        content = self.content_ids(text)
        te1, te2 = [], []
        for begin in range(0, max_token_length, CHUNK_CONTENT):
            chunk = [START_ID, *content[begin : min(begin + CHUNK_CONTENT, max_token_length)], END_ID]
            te1.append(chunk + [TE1_PADDING_ID] * (CHUNK_LENGTH - len(chunk)))
            te2.append(chunk + [TE2_PADDING_ID] * (CHUNK_LENGTH - len(chunk)))
        return te1, te2, len(content)


def load_tokenizers(cache_dir: str | None, base_dir: str | None, store: bool = True) -> PromptTokenizer:
    """The tokenizer of both text encoders, after comparing every tokenizer on disk with CLIP's vocabulary.

    SDXL's encoders know one vocabulary, so files on disk can agree with it or be wrong; their padding tokens have no effect, and neither
    has a swap of the two. Nothing is ever downloaded.

    Args:
        cache_dir: `tokenizer_cache_dir`; folders that are absent or incomplete are filled, if `store`.
        base_dir: the base model when it is a diffusers directory, else None.
    Raises:
        CheckpointError: a tokenizer with another vocabulary, other ids or other merges; or the cache cannot be written.
    """
    vocabulary, merges = packaged_vocabulary()
    for root, folders in ((base_dir, _BASE_FOLDERS), (cache_dir, CACHE_FOLDERS)):
        if root is not None:
            for folder in folders:
                _check_folder(os.path.join(root, folder), vocabulary, merges)
    if cache_dir is not None and store:
        for folder in CACHE_FOLDERS:
            _fill_folder(Path(cache_dir, folder), vocabulary, merges)
    return PromptTokenizer()


def packaged_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's ids by token and its merges in order, from the packaged list (see tokenizers/NOTICE.md)."""
    packed = resources.files("sdxl_train.model").joinpath("tokenizers", "clip_merges.txt.gz").read_bytes()
    merges = [(left, right) for left, right in (line.split(" ") for line in gzip.decompress(packed).decode().splitlines())]
    characters = list(_byte_characters())
    tokens = [*characters, *(c + _END_OF_WORD for c in characters), *(left + right for left, right in merges), _START, _END]
    return {token: number for number, token in enumerate(tokens)}, merges


def _byte_characters() -> Iterator[str]:
    """The printable stand-ins of the 256 bytes in CLIP's order: printable bytes themselves, then the others from U+0100 on (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    yield from (chr(byte) for byte in printable)
    yield from (chr(256 + number) for number in range(256 - len(printable)))


def _check_folder(folder: str, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    whole = os.path.join(folder, "tokenizer.json")
    if os.path.isfile(whole):
        model = _read_json(whole)
        try:
            added = {token["content"]: token["id"] for token in model.get("added_tokens", [])}
            found, pairs = model["model"]["vocab"], model["model"]["merges"]
            found_merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in pairs]
            _compare(whole, {**found, **added}, vocabulary, found_merges, merges)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{whole}: not a byte-pair tokenizer") from error
    if os.path.isfile(path := os.path.join(folder, "vocab.json")):
        _compare(path, _read_json(path), vocabulary, merges, merges)
    if os.path.isfile(path := os.path.join(folder, "merges.txt")):
        lines = _read_text(path).split("\n")
        found_merges = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
        _compare(path, vocabulary, vocabulary, found_merges, merges)


def _compare(path: str, found: dict[str, Any], vocabulary: dict[str, int], found_merges: list[Any], merges: list[tuple[str, str]]) -> None:
    if found != vocabulary:
        different = [token for token in {**vocabulary, **found} if found.get(token) != vocabulary.get(token)]
        examples = ", ".join(f"{token[:40]!r} is {found.get(token)}, not {vocabulary.get(token)}" for token in different[:3])
        what = f"{len(different)} ids differ ({examples})"
    elif found_merges != merges:
        what = f"its {len(found_merges)} merges are not CLIP's {len(merges)}"
    else:
        return
    raise CheckpointError(f"{path}: not the vocabulary of SDXL's text encoders: {what}. Remove the folder, then it is filled anew")


def _read_json(path: str) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_FILE_BYTES).decode()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8") from error


def _fill_folder(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Writes what is missing, in the form that transformers' CLIPTokenizer reads."""
    if (folder / "tokenizer.json").is_file() or ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        return
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CHUNK_LENGTH, **special}
    texts = {
        "special_tokens_map.json": json.dumps(special, indent=2),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges),
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            if not (folder / name).exists():
                with atomic_file(folder / name) as temporary:
                    temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder}: tokenizer_cache_dir cannot be filled: {error.strerror}") from error
