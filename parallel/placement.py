"""Over how many levels each kind of state is sharded.

P (parameters) ⊆ G (gradients) ⊆ O (optimizer states and master weights), each a number of innermost levels.

| preset            | P         | G       | O     | known as                                             |
|-------------------|-----------|---------|-------|------------------------------------------------------|
| ddp               | -         | -       | -     | data parallelism                                     |
| zero1 zero2 zero3 | - / - / * | - / * / * | all | ZeRO (arXiv 1910.02054)                              |
| hsdp              | inner     | inner   | inner | hybrid sharding, MiCS (arXiv 2205.00119)             |
| hfsdp             | inner     | inner   | all   | hybrid sharding with a globally sharded optimizer    |
| topo              | innermost | inner   | all   | low-bandwidth partitioning (arXiv 2501.04266, sec. 4) |

*inner* is every level but the outermost, and the only one where there is one.
"""

from dataclasses import dataclass

from parallel.options import ParallelOptions


@dataclass(frozen=True)
class Placement:
    """P ⊆ G ⊆ O (arXiv 2501.04266, sec. 3): over how many of the innermost levels parameters, gradients and optimizer
    states are sharded. ValueError where they are not ordered so."""

    params: int
    grads: int
    optim: int

    def __post_init__(self) -> None:
        if not 0 <= self.params <= self.grads <= self.optim:
            raise ValueError(
                f"parallel.params={self.params} <= parallel.grads={self.grads} <= parallel.optim={self.optim} must be: "
                f"whoever updates a range must hold its gradient, and whoever reduces one must hold its weights"
            )

    @classmethod
    def of(cls, options: ParallelOptions, num_levels: int) -> "Placement":
        """The placement that `options` name, on a mesh of `num_levels` levels."""
        if options.placement == "free":
            assert options.params is not None and options.grads is not None and options.optim is not None
            placement = cls(options.params, options.grads, options.optim)
            if options.optim > num_levels:
                raise ValueError(
                    f"parallel.optim={options.optim} is more than the number of parallel.levels, which is {num_levels}"
                )
            return placement
        every, inner, innermost = num_levels, max(1, num_levels - 1), 1
        return cls(
            *{
                "ddp": (0, 0, 0),
                "zero1": (0, 0, every),
                "zero2": (0, every, every),
                "zero3": (every, every, every),
                "hsdp": (inner, inner, inner),
                "hfsdp": (inner, inner, every),
                "topo": (innermost, inner, every),
            }[options.placement]
        )

    def describe(self, names: tuple[str, ...]) -> str:
        """``P over die, G over gpu x die, O over node x gpu x die``."""

        def over(levels: int) -> str:
            return "over " + " x ".join(names[len(names) - levels :]) if levels else "whole"

        return f"P {over(self.params)}, G {over(self.grads)}, O {over(self.optim)}"
