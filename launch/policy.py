"""What the supervisor decides, apart from how it is done: whether to go on after a failure, and on how many nodes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from launch.checks import Crew
from launch.config import Config
from launch.worker import Failure

RESET_STEPS = 100
"""Steps without a failure after which the budgets are full again: a run of months may meet any number of them."""


@dataclass
class FailurePolicy:
    """Three budgets: failures, preemptions, which are not the job's fault, and ways back from bad numbers."""

    max_failures: int
    max_preemptions: int
    max_rewinds: int
    _failures: int = 0
    _preemptions: int = 0
    _rewinds: int = 0
    _last: tuple[str, int] = ("", -1)
    _last_step: int = 0

    def give_up(self, failure: Failure, step: int, moved: bool) -> str:
        """Why not to go on after this failure; empty: go on.

        step: how many are done. moved: whether one of them was done since the driver started.
        """
        rewinds = failure.next_batch is not None  # it goes on with other data
        elsewhere = rewinds or failure.good_step is not None  # or from another step
        own = failure.kind in ("error", "numbers") and not failure.symptom and not elsewhere
        if own and not moved:
            return "it came before the first step, and would come again"
        if own and (failure.cause, step) == self._last:
            return f"the same came twice after {step} steps"
        self._last = failure.cause, step
        if step - self._last_step >= RESET_STEPS:
            self._failures = self._preemptions = self._rewinds = 0
        self._last_step = step
        if rewinds:
            self._rewinds += 1
            if self._rewinds > self.max_rewinds:
                return _spent("rewind", "train.rewinds", self.max_rewinds)
        elif failure.kind == "preemption":
            self._preemptions += 1
            if self._preemptions > self.max_preemptions:
                return _spent("preemption", "launch.max_preemptions", self.max_preemptions)
        else:
            self._failures += 1
            if self._failures > self.max_failures:
                return _spent("failure", "launch.max_failures", self.max_failures)
        return ""


def by_itself(failure: Failure, resume: str) -> Failure:
    """As the run may recover from it: a checkpoint that ``run.resume`` names is the one that is wanted, and where that
    is damaged the run goes on from no other by itself."""
    return replace(failure, good_step=None) if resume.isdigit() else failure


def _spent(what: str, option: str, most: int) -> str:
    return f"{option}={most} is used up" if most else f"{option}=0: no {what} is recovered from"


class ScalingPolicy:
    """On how many nodes to go on: on as many as were asked for, or on the most that the job divides over."""

    def __init__(self, config: Config, wanted: Crew, settle: Callable[[Config, Crew], Config]) -> None:
        """config: as it was asked for; `settle` fits it to a crew and checks it, ValueError where it does not fit."""
        self.wanted = wanted
        self._config, self._settle = config, settle
        self._settled: dict[int, Config | None] = {}

    def crew(self, num_nodes: int) -> Crew | None:
        """The largest crew on at most so many nodes, each with as many workers as ever; None where there is none."""
        for nodes in range(min(num_nodes, self.wanted.nodes), 0, -1):
            if self._fitting(nodes) is not None:
                return self._crew(nodes)
        return None

    def config(self, crew: Crew) -> Config:
        """What such a crew trains."""
        config = self._fitting(crew.nodes)
        assert config is not None, "a crew that the policy has named"
        return config

    def _crew(self, nodes: int) -> Crew:
        return Crew(nodes * self.wanted.per_node, nodes, self.wanted.device)

    def _fitting(self, nodes: int) -> Config | None:
        if nodes not in self._settled:
            try:
                self._settled[nodes] = self._settle(self._scaled(nodes), self._crew(nodes))
            except ValueError:
                if nodes == self.wanted.nodes:
                    raise
                self._settled[nodes] = None
        return self._settled[nodes]

    def _scaled(self, nodes: int) -> Config:
        """With what the user said of all nodes said of fewer: the outermost level, and what snapshots spread over."""
        config, before = self._config, self.wanted.nodes
        if nodes == before:
            return config
        levels = dict(config.parallel.levels)
        if levels:
            outermost = next(iter(levels))
            if levels[outermost] * nodes % before:
                raise ValueError(f"parallel.levels: {outermost} {levels[outermost]} does not shrink to {nodes} nodes")
            levels[outermost] = levels[outermost] * nodes // before
        parity, group = config.checkpoint.parity, config.checkpoint.group_nodes
        checkpoint = replace(
            config.checkpoint,
            parity=None if parity is None else min(parity, nodes - 1),
            group_nodes=None if group is None else min(group, nodes),
        )
        run = replace(config.run, resume="auto")  # what was asked of the first start has been done
        return replace(config, parallel=replace(config.parallel, levels=levels), checkpoint=checkpoint, run=run)
