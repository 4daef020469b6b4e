"""Tokenizers: a ``tokenizer.json`` and a Hugging Face folder, trained here on a few words."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from trainer.data import open_corpus
from trainer.data.tokenizer import open_tokenizer
from trainer.options import DataOptions

TEXT = "the quick brown fox jumps over the lazy dog – naïve, 東京 " * 3


def train_bpe(special: Sequence[str] = ("<|endoftext|>",), vocab_size: int = 300) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def save_json(tmp_path: Path, tokenizer: Tokenizer) -> str:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def save_folder(tmp_path: Path, **special: str) -> str:
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=train_bpe(), **special)
    fast.save_pretrained(tmp_path / "folder")
    return str(tmp_path / "folder")


def test_a_tokenizer_json_encodes_as_its_library_does(tmp_path: Path) -> None:
    library = train_bpe()
    tokenizer = open_tokenizer(save_json(tmp_path, library))
    assert tokenizer.encode([TEXT.encode(), b"dog"])[0].tolist() == library.encode(TEXT).ids
    assert tokenizer.decode(library.encode(TEXT).ids) == TEXT
    assert tokenizer.vocab_size == library.get_vocab_size()
    assert tokenizer.end_of_text == library.token_to_id("<|endoftext|>")


def test_what_a_tokenizer_json_adds_or_cuts_is_left_off(tmp_path: Path) -> None:
    library = train_bpe(special=("<|endoftext|>", "<s>"))
    expected = library.encode(TEXT).ids
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    library.enable_truncation(4)
    library.enable_padding(length=1000)
    assert open_tokenizer(save_json(tmp_path, library)).encode([TEXT.encode()])[0].tolist() == expected


def test_a_hugging_face_folder_encodes_as_its_json_does(tmp_path: Path) -> None:
    json, folder = (
        open_tokenizer(save_json(tmp_path, train_bpe())),
        open_tokenizer(save_folder(tmp_path, eos_token="fox")),
    )
    assert folder.encode([TEXT.encode()])[0].tolist() != []
    plain = "the lazy dog"
    assert np.array_equal(folder.encode([plain.encode()])[0], json.encode([plain.encode()])[0])
    assert folder.decode(folder.encode([plain.encode()])[0].tolist()) == plain
    assert folder.decode([folder.end_of_text]) == "fox"
    assert folder.vocab_size == max(json.vocab_size, folder.end_of_text + 1)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "uint16"), (256 + 1, "uint16")])
def test_a_corpus_is_tokenized_in_batches_into_the_smallest_dtype(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    library = train_bpe(vocab_size=vocab_size)
    name = save_json(tmp_path, library)
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text(f"{number} {TEXT}")
    options = DataOptions(
        source="text",
        paths=[f"{tmp_path}/*.txt"],
        tokenizer=name,
        valid_fraction=0.0,
        cache_dir=str(tmp_path / "cache"),
    )
    opened = open_corpus(options, seq_len=4, seed=0)
    expected = [
        token
        for n in range(30)
        for token in [*library.encode(f"{n:d} {TEXT}").ids, library.token_to_id("<|endoftext|>")]
    ]
    assert opened._cache.tokens["train"].tolist() == expected
    assert opened._cache.meta.dtype == dtype
    assert opened.decode(opened.encode(TEXT)) == TEXT


def test_another_tokenizer_has_another_cache(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    options = DataOptions(
        source="text",
        paths=[f"{tmp_path}/a.txt"],
        tokenizer=save_json(tmp_path, train_bpe()),
        valid_fraction=0.0,
        cache_dir=str(tmp_path / "cache"),
    )
    before = open_corpus(options, 4, 0)
    save_json(tmp_path, train_bpe(vocab_size=270))
    after = open_corpus(options, 4, 0)
    assert before.vocab_size == 300 and after.vocab_size == 270
    assert before.fingerprint != after.fingerprint


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.tokenizer=.*none.json: .*No such file.*allowed are bytes"):
        open_tokenizer(f"{tmp_path}/none.json")
    with pytest.raises(ValueError, match=r"data.tokenizer=.*/none: .*allowed are bytes"):
        open_tokenizer(f"{tmp_path}/none")


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"data.tokenizer=.*tokenizer.json: "):
        open_tokenizer(f"{tmp_path}/tokenizer.json")


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.tokenizer=.*no end-of-text token .*tokenizer_config.json"):
        open_tokenizer(save_json(tmp_path, train_bpe(special=("[UNK]",))))
    with pytest.raises(ValueError, match=r"data.tokenizer=.*folder: it has no eos_token"):
        open_tokenizer(save_folder(tmp_path))


@pytest.mark.parametrize(("name", "module"), [("tokenizer.json", "tokenizers"), ("gpt2", "transformers")])
def test_a_missing_library_is_answered_with_the_extra(monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ValueError, match=rf"^data.tokenizer={name} needs the package {module} .*pip install 'atoll\[hf\]'"
    ):
        open_tokenizer(name)
