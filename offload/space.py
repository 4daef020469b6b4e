"""Sizes and places are multiples: of a cache line, a page, a block of a drive."""


def round_up(number: int, multiple: int) -> int:
    """The first multiple that is not below `number`."""
    return -(-number // multiple) * multiple
