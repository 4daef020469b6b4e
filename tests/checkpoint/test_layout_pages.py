"""Chunks begin at pages, so that all of them can be written past the page cache."""

import pytest

from checkpoint.index import ArrayLayout
from checkpoint.persisted.folder import PAGE_BYTES


@pytest.mark.parametrize("length", [1, 16384, 16385, 100_003, 1_000_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_every_chunk_begins_at_a_page_and_none_is_longer_than_asked(length: int, dtype: str) -> None:
    array = ArrayLayout.cut("master", dtype, length, 64 << 10)
    size = array.chunk * array.item_bytes
    assert size <= 64 << 10 and array.num_chunks * array.chunk >= length
    assert array.num_chunks == 1 or size % PAGE_BYTES == 0
    assert array.num_chunks * array.chunk - length < array.chunk
