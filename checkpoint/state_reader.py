"""Reading state by ranges of a parameter, whatever the number of ranks that wrote it and wherever it lies."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import NoReturn

import torch

from checkpoint.index import DTYPES, Index, Span
from offload.state import Piece


class StateReader(ABC):
    """What readers of checkpoints and of snapshots have in common. `what`: how errors call it."""

    def __init__(self, what: str, indexes: Mapping[int, Index]) -> None:
        """indexes: by rank, what each wrote; `_misfit` where that does not make up whole parameters."""
        self._what = what
        self._spans: dict[tuple[str, str], list[tuple[int, Span]]] = {}
        for rank in sorted(indexes):
            for span in indexes[rank].spans:
                self._spans.setdefault((span.name, span.kind), []).append((rank, span))
        for (name, kind), spans in self._spans.items():
            spans.sort(key=lambda entry: (entry[1].start, entry[1].stop))
            if len({(span.shape, span.dtype) for _, span in spans}) > 1:
                self._misfit(f"the ranks disagree about shape or dtype of {name} ({kind})")
            ends = [0] + [span.stop for _, span in spans]
            starts = [span.start for _, span in spans] + [math.prod(spans[0][1].shape)]
            if ends != starts:
                self._misfit(f"the pieces of {name} ({kind}) leave gaps or overlap")

    def names(self) -> list[str]:
        """Names of all parameters and buffers, in the order they were saved."""
        return list(dict.fromkeys(name for name, _ in self._spans))

    def kinds(self, name: str) -> list[str]:
        """Kinds of state that are there of one parameter."""
        return [kind for found, kind in self._spans if found == name]

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        return self._of(name, kind)[0][1].shape

    def dtype(self, name: str, kind: str) -> torch.dtype:
        return DTYPES[self._of(name, kind)[0][1].dtype].torch

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start:stop`` as a 1-D CPU tensor in the dtype they were saved in (`offload.state.Read`).

        KeyError where there is no such state, ValueError where the range is not in it.
        """
        if not 0 <= start <= stop:
            raise ValueError(f"elements {start}:{stop} of {name} ({kind})")
        out = torch.empty(stop - start, dtype=self.dtype(name, kind))
        self.fill([Piece(name=name, kind=kind, start=start, stop=stop, shape=self.shape(name, kind), tensor=out)])
        return out

    @abstractmethod
    def fill(self, pieces: Iterable[Piece]) -> None:
        """Put what they name into the pieces' tensors, on any device and of any dtype (`offload.state.Fill`)."""

    @abstractmethod
    def _misfit(self, text: str) -> NoReturn:
        """Raise what says that the ranks' pieces do not make up whole parameters."""

    def _overlaps(self, piece: Piece) -> Iterator[tuple[int, Span, int, int]]:
        """Rank, span, and the elements ``first:last`` of the parameter that the span has of the piece."""
        spans = self._of(piece.name, piece.kind)
        numel = math.prod(spans[0][1].shape)
        if not 0 <= piece.start <= piece.stop <= numel:
            raise ValueError(f"elements {piece.start}:{piece.stop} of {piece.name} ({piece.kind}), which has {numel}")
        for rank, span in spans:
            first, last = max(piece.start, span.start), min(piece.stop, span.stop)
            if first < last:
                yield rank, span, first, last

    def _of(self, name: str, kind: str) -> list[tuple[int, Span]]:
        try:
            return self._spans[name, kind]
        except KeyError:
            raise KeyError(f"{self._what} has no {kind} of {name}") from None
