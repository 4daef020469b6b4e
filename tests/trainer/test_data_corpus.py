"""The corpus as the training loop sees it: packing, splits, order."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch

from trainer.data import Corpus, open_corpus
from trainer.options import DataOptions

EOT = 0xFF


def write(folder: Path, *documents: str) -> None:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(documents):
        (folder / f"{number:04}.txt").write_text(text)


def corpus(tmp_path: Path, seq_len: int = 8, seed: int = 0, **options: object) -> Corpus:
    base = DataOptions(
        source="text", paths=[f"{tmp_path}/texts/*.txt"], valid_fraction=0.0, cache_dir=str(tmp_path / "cache")
    )
    return open_corpus(dataclasses.replace(base, **options), seq_len, seed)


def test_documents_are_packed_with_an_end_of_text_after_each(tmp_path: Path) -> None:
    write(tmp_path / "texts", "abc", "", "defgh", "ij")
    opened = corpus(tmp_path, seq_len=4)
    stream = [*b"abc", EOT, *b"defgh", EOT, *b"ij", EOT]
    assert opened.train.num_tokens == len(stream) == 13
    assert opened.train.num_sequences == 3
    assert opened.train.sequential(0, 3).tolist() == [stream[0:5], stream[4:9], stream[8:13]]
    assert opened.valid is None


def test_a_batch_is_int64_of_one_token_more_than_seq_len(tmp_path: Path) -> None:
    write(tmp_path / "texts", "x" * 100)
    batch = corpus(tmp_path).train.batch(3, 5)
    assert batch.dtype == torch.int64 and batch.shape == (5, 9)
    assert corpus(tmp_path).train.batch(3, 0).shape == (0, 9)


def test_an_epoch_visits_each_sequence_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    write(tmp_path / "texts", "".join(map(chr, range(33, 120))) * 3)
    train = corpus(tmp_path).train
    n = train.num_sequences
    stored = sorted(train.sequential(0, n).tolist())
    first, second = train.batch(0, n).tolist(), train.batch(n, n).tolist()
    assert sorted(first) == sorted(second) == stored
    assert first != second


def test_a_batch_across_the_end_of_an_epoch_joins_both(tmp_path: Path) -> None:
    write(tmp_path / "texts", "".join(map(chr, range(33, 120))) * 3)
    train = corpus(tmp_path).train
    n = train.num_sequences
    across = train.batch(n - 2, n + 5)
    assert torch.equal(across, torch.cat([train.batch(n - 2, 2), train.batch(n, n), train.batch(2 * n, 3)]))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_order_is_the_same_on_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    write(tmp_path / "texts", "".join(map(chr, range(33, 120))) * 5)
    alone = corpus(tmp_path).train.batch(0, 10 * 8)
    each = [corpus(tmp_path).train for _ in range(workers)]
    share = 8 // workers
    steps = [train.batch(step * 8 + rank * share, share) for step in range(10) for rank, train in enumerate(each)]
    assert torch.equal(torch.cat(steps), alone)


def test_continued_mid_epoch_by_the_index_alone(tmp_path: Path) -> None:
    write(tmp_path / "texts", "".join(map(chr, range(33, 120))) * 5)
    uninterrupted = corpus(tmp_path, seed=3).train.batch(0, 40)
    assert torch.equal(corpus(tmp_path, seed=3).train.batch(17, 23), uninterrupted[17:])
    assert not torch.equal(corpus(tmp_path, seed=4).train.batch(17, 23), uninterrupted[17:])


def documents_of(split_tokens: list[int]) -> set[str]:
    return {text for text in bytes(split_tokens).decode(errors="replace").split("\ufffd") if text}


def everything(split: object, seq_len: int = 1) -> set[str]:
    rows = split.sequential(0, split.num_sequences)  # type: ignore[attr-defined]
    return documents_of([*rows[:, 0].tolist(), int(rows[-1, -1])])


def test_held_out_documents_do_not_depend_on_the_order_of_the_files(tmp_path: Path) -> None:
    documents = [f"document number {n}" for n in range(200)]
    write(tmp_path / "texts", *documents)
    before = corpus(tmp_path, seq_len=1, valid_fraction=0.2)
    write(tmp_path / "texts", *reversed(documents))
    after = corpus(tmp_path, seq_len=1, valid_fraction=0.2)
    assert before.valid is not None and after.valid is not None
    assert everything(before.valid) == everything(after.valid)
    assert everything(before.train) | everything(before.valid) == set(documents)
    assert not everything(before.train) & everything(before.valid)
    assert 20 <= len(everything(before.valid)) <= 60
    assert before.fingerprint != after.fingerprint  # of the order, too


def test_a_larger_share_holds_out_the_same_documents_and_more(tmp_path: Path) -> None:
    write(tmp_path / "texts", *[f"document number {n}" for n in range(200)])
    few, many = (corpus(tmp_path, seq_len=1, valid_fraction=share).valid for share in (0.1, 0.3))
    assert few is not None and many is not None
    assert everything(few) < everything(many)


def test_valid_paths_are_validated_on_and_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "texts", "training text", "validation text")
    opened = corpus(tmp_path, seq_len=4, valid_fraction=0.5, valid_paths=[f"{tmp_path}/texts/0001.txt"])
    assert opened.valid is not None
    assert opened.decode(opened.train.sequential(0, 1)[0].tolist()) == "train"
    assert opened.decode(opened.valid.sequential(0, 1)[0].tolist()) == "valid"
    assert opened.train.num_tokens == len("training text") + 1


def test_one_long_file_is_cut_into_parts_that_are_held_out_one_by_one(tmp_path: Path) -> None:
    lines = [f"line {number} of a long file" for number in range(20_000)]
    write(tmp_path / "texts", "\n".join(lines))
    opened = corpus(tmp_path, seq_len=64, valid_fraction=0.1)
    assert opened.valid is not None
    tokens = [opened._cache.tokens[name].tobytes() for name in ("train", "valid")]
    found = [line for text in tokens for line in text.replace(b"\xff", b"\n").decode().split("\n") if line]
    assert sorted(found) == sorted(lines)  # cut between lines alone, nothing lost
    assert 0.03 < opened.valid.num_tokens / opened.train.num_tokens < 0.25


@pytest.mark.parametrize("character", ["é", "€", "😀", "x"])
def test_a_long_file_without_lines_is_cut_between_characters(tmp_path: Path, character: str) -> None:
    text = character * (300_000 // len(character.encode()))
    write(tmp_path / "texts", "a" + text)
    opened = corpus(tmp_path)
    assert opened._cache.tokens["train"].tobytes() == b"a" + text.encode() + b"\xff"


def test_text_and_tokens_are_inverse(tmp_path: Path) -> None:
    write(tmp_path / "texts", "x" * 20)
    opened = corpus(tmp_path)
    assert opened.vocab_size == 256 and opened.end_of_text == EOT
    assert opened.decode(opened.encode("naïve – 東京\0\n")) == "naïve – 東京\0\n"
    assert opened.decode([*b"ab", 0x80, 300, EOT, *b"c"]) == "ab\ufffd\ufffd<|endoftext|>c"


def test_it_describes_itself_in_one_line(tmp_path: Path) -> None:
    write(tmp_path / "texts", "abc" * 1000, "", "def" * 1000)
    text = corpus(tmp_path, name="mine").describe()
    assert "\n" not in text
    for part in ("mine: 2 documents", "1 empty", "0.0 MB", "6,002 tokens", str(tmp_path / "cache")):
        assert part in text


def test_too_little_text_names_the_tokens_and_seq_len(tmp_path: Path) -> None:
    write(tmp_path / "texts", "short")
    with pytest.raises(
        ValueError, match=r"data.paths=.* gives 6 tokens, .*train.seq_len \+ 1 = 9 .*lower train.seq_len"
    ):
        corpus(tmp_path)


def test_empty_files_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "texts", "", "")
    with pytest.raises(ValueError, match=r"data.paths=.* gives 0 tokens"):
        corpus(tmp_path)


def test_too_small_a_validation_split_says_the_remedy(tmp_path: Path) -> None:
    write(tmp_path / "texts", "the one and only document")
    with pytest.raises(
        ValueError, match=r"data.valid_fraction=1e-09 holds out 0 tokens in 0 documents.*data.valid_fraction=0"
    ):
        corpus(tmp_path, valid_fraction=1e-9)
    (tmp_path / "tiny.txt").write_text("tiny")
    with pytest.raises(ValueError, match=r"data.valid_paths=.*tiny.txt.* holds out 5 tokens"):
        corpus(tmp_path, valid_paths=[str(tmp_path / "tiny.txt")])


def test_a_validation_split_that_takes_everything_says_so(tmp_path: Path) -> None:
    write(tmp_path / "texts", "the one and only document")
    with pytest.raises(ValueError, match=r"data.valid_fraction=0.999999 leaves 0 of 26 tokens to train on"):
        corpus(tmp_path, valid_fraction=0.999999)


@pytest.mark.timed
def test_the_standard_library_is_at_hand_in_seconds(tmp_path: Path) -> None:
    start = time.perf_counter()
    opened = open_corpus(DataOptions(cache_dir=str(tmp_path)), seq_len=256, seed=0)
    assert time.perf_counter() - start < 3
    assert opened.valid is not None
    assert opened.train.num_tokens > 5e6 and opened.valid.num_sequences > 128
    assert b"unittest" in opened._cache.tokens["train"].tobytes()
