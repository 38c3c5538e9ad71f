"""Token ids and chunks."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from transformers import CLIPTokenizer

from sdxl_train.errors import CheckpointError, DataError
from sdxl_train.model.tokenizer import CACHE_FOLDERS, PromptTokenizer, load_tokenizers

ORACLES = json.loads((Path(__file__).parents[2] / "oracles.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return load_tokenizers(None, None)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizers") / "cache"
    load_tokenizers(str(root), None)
    return root


@pytest.fixture
def cache(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "cache"))


@pytest.mark.parametrize(("given", "expected"), list(zip(*(ORACLES["token_chunks"][key] for key in ("inputs", "expected")), strict=True)))
def test_chunks_are_those_of_the_oracle(tokenizer: PromptTokenizer, given: dict, expected: dict) -> None:
    te1, te2, length = tokenizer.tokenize(given["text"], given["max_token_length"])
    assert {"te1": te1, "te2": te2, "content_length": length} == expected


@pytest.mark.parametrize(("limit", "chunks"), [(75, 1), (150, 2), (225, 3)])
def test_the_limit_counts_content_and_cuts_there(tokenizer: PromptTokenizer, limit: int, chunks: int) -> None:
    te1, te2, length = tokenizer.tokenize("cat " * 300, limit)
    assert length == 300 and te1 == te2 == [[49406] + [2368] * 75 + [49407]] * chunks


def test_known_ids(tokenizer: PromptTokenizer) -> None:
    assert tokenizer.content_ids("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert tokenizer.content_ids("wow!") == [2781, 256]


def test_parentheses_and_colons_are_text(tokenizer: PromptTokenizer) -> None:
    assert tokenizer.content_ids("(cat:1.5)") == [263, 2368, 281, 272, 269, 276, 264]


TEXTS = [
    "Hello, WORLD (1.2:3) [x]  \t\n y",
    "一只猫在跑，中文。カタカナ 한국어",
    "🐱🎉👨‍👩‍👧 emoji ❤️",
    "é e\u0301 Å ﬁ ǅ İstanbul ẞ ŀ ŉ ΣΑΣ",
    "don't they've I'M we'Ll",
    "2024 ½ ² ③",
    "",
    "   \n",
    "<|endoftext|> a <|startoftext|>b <|ENDOFTEXT|>",
    "\u200b\ufeff zero \x00\x07 control",
    "русский ТЕКСТ العربية हिन्दी ไทย",
    "a_b-c/d\\e !!! ???",
    "x" * 500,
]


def test_ids_are_those_of_transformers(tokenizer: PromptTokenizer, filled: Path) -> None:
    reference = CLIPTokenizer.from_pretrained(str(filled / CACHE_FOLDERS[0]))
    draw = random.Random(0)
    spans = ((32, 127), (32, 0x500), (0x3000, 0xD000), (0x1F300, 0x1FAFF))
    mixed = ["".join(chr(draw.randrange(*draw.choice(spans))) for _ in range(30)) for _ in range(300)]
    for text in TEXTS + mixed:
        assert tokenizer.content_ids(text) == reference(text)["input_ids"][1:-1], text


def test_half_a_surrogate_pair_is_an_error(tokenizer: PromptTokenizer) -> None:
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.content_ids("a\ud800")


def test_counting_tokens_needs_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; from sdxl_train.model.text import load_tokenizers\n"
        "assert load_tokenizers(None, None).tokenize('a cat', 75)[2] == 2\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False False\n"


# tokenizer_cache_dir


def test_an_empty_cache_is_filled_for_both_encoders_with_the_end_marker_as_padding(filled: Path) -> None:
    for folder in CACHE_FOLDERS:
        stored = CLIPTokenizer.from_pretrained(str(filled / folder))
        assert (len(stored), stored.pad_token_id, stored.model_max_length) == (49408, 49407, 77)
        assert stored("wow!")["input_ids"] == [49406, 2781, 256, 49407]


def test_without_storing_nothing_is_written(tmp_path: Path) -> None:
    load_tokenizers(str(tmp_path / "cache"), None, store=False)
    assert not (tmp_path / "cache").exists()


def test_a_complete_cache_is_not_written_again(cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    load_tokenizers(str(cache), None)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_an_incomplete_cache_is_completed(cache: Path) -> None:
    (cache / CACHE_FOLDERS[1] / "merges.txt").unlink()
    load_tokenizers(str(cache), None)
    assert (cache / CACHE_FOLDERS[1] / "merges.txt").read_bytes() == (cache / CACHE_FOLDERS[0] / "merges.txt").read_bytes()


def test_swapped_folders_and_other_padding_tokens_have_no_effect(cache: Path, tokenizer: PromptTokenizer) -> None:
    first, second = (cache / folder for folder in CACHE_FOLDERS)
    config = json.loads((second / "tokenizer_config.json").read_text())
    (second / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "!"}))
    first.rename(cache / "x")
    second.rename(first)
    (cache / "x").rename(second)
    assert load_tokenizers(str(cache), None).tokenize("wow!", 75) == tokenizer.tokenize("wow!", 75)


@pytest.mark.parametrize("as_base", [False, True])
@pytest.mark.parametrize("change", ["id", "token", "merge", "tokenizer.json", "not json"])
def test_another_vocabulary_is_an_error_that_names_the_file(cache: Path, change: str, as_base: bool) -> None:
    folder = cache / CACHE_FOLDERS[1]
    path = folder / {"merge": "merges.txt", "tokenizer.json": "tokenizer.json"}.get(change, "vocab.json")
    if change == "merge":
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join([*lines[:-2], lines[-1], lines[-2]]), encoding="utf-8")
    elif change == "tokenizer.json":
        CLIPTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
        load_tokenizers(str(cache), None)  # transformers' own form is accepted
        model = json.loads(path.read_text(encoding="utf-8"))
        model["model"]["merges"].pop()
        path.write_text(json.dumps(model), encoding="utf-8")
    elif change == "not json":
        path.write_text("[" * 100_000)
    else:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
        if change == "id":
            vocabulary["cat</w>"], vocabulary["dog</w>"] = vocabulary["dog</w>"], vocabulary["cat</w>"]
        else:
            vocabulary["<new>"] = 49408
        path.write_text(json.dumps(vocabulary), encoding="utf-8")
    if as_base:
        folder.rename(cache / "tokenizer_2")
        path = cache / "tokenizer_2" / path.name
    with pytest.raises(CheckpointError, match=str(path)):
        load_tokenizers(None if as_base else str(cache), str(cache) if as_base else None)


def test_counting_gives_the_number_of_ids_for_any_text():
    tokenizer = PromptTokenizer()
    random = Random(0)
    pieces = ["cat", "Blue Hair", "it's", "they'LL", "1girl", "42", "(", ")", "...", "wow!", "<|endoftext|>", "<|ENDOFTEXT|>", "\n", "\t", "  "]
    pieces += ["\x1c", "\x0b", "é", "猫", "_", "supercalifragilistic", "'", "a'b", ":", "\\(", "'Re"]
    texts = ["", " ", *("".join(random.choices(pieces, k=random.randrange(1, 12))) for _ in range(3000))]
    texts += ["".join(chr(random.randrange(128)) for _ in range(random.randrange(30))) for _ in range(2000)]
    assert [text for text in texts if tokenizer.count(text) != len(tokenizer.content_ids(text))] == []
