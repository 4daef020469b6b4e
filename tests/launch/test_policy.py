"""Whether to go on after a failure, and on how many nodes."""

from dataclasses import replace

import pytest
import torch

from checkpoint.options import CheckpointOptions
from launch.checks import Crew
from launch.config import Config
from launch.options import LaunchOptions
from launch.policy import RESET_STEPS, FailurePolicy, ScalingPolicy
from launch.worker import Failure, describe
from parallel.options import ParallelOptions
from trainer.options import TrainOptions

DIED = Failure(cause="its process died", kind="process")


def test_each_budget_is_its_own_and_is_used_up() -> None:
    policy = FailurePolicy(max_failures=2, max_preemptions=1, max_rewinds=2)
    assert not policy.give_up(DIED, 5, True)
    assert not policy.give_up(Failure(cause="claimed", kind="preemption"), 6, True)
    assert not policy.give_up(DIED, 7, True)
    assert policy.give_up(DIED, 8, True) == "launch.max_failures=2 is used up"
    assert "launch.max_preemptions=1" in policy.give_up(Failure(cause="claimed", kind="preemption"), 9, True)


def test_a_long_time_without_failures_fills_the_budget() -> None:
    policy = FailurePolicy(max_failures=1, max_preemptions=0, max_rewinds=2)
    assert not policy.give_up(DIED, 10, True)
    assert not policy.give_up(DIED, 10 + RESET_STEPS, True)
    assert policy.give_up(DIED, 10 + RESET_STEPS + 1, True)


def test_what_would_come_again_is_not_tried_again() -> None:
    policy = FailurePolicy(max_failures=9, max_preemptions=9, max_rewinds=2)
    mistake = Failure(cause="ValueError: no such file", user=True)
    assert "before the first step" in policy.give_up(mistake, 0, False)
    numbers = Failure(cause="FloatingPointError: the loss is nan", kind="numbers")
    assert not policy.give_up(numbers, 40, True)
    assert "twice" in policy.give_up(numbers, 40, True)
    assert not policy.give_up(replace(DIED), 0, False), "a process may die at any time"


def test_memory_that_is_short_before_the_first_step_would_come_again_and_an_error_of_cuda_may_not() -> None:
    policy = FailurePolicy(max_failures=9, max_preemptions=9, max_rewinds=2)
    short = describe(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert "before the first step" in policy.give_up(short, 0, False)
    for text in ("CUDA error: an illegal memory access was encountered", "NCCL error: unhandled cuda error"):
        failure = describe(RuntimeError(text))
        assert failure.kind == "device", text
        assert not policy.give_up(failure, 0, False), text


def test_rewinds_have_a_budget_of_their_own_and_go_on_with_other_data() -> None:
    policy = FailurePolicy(max_failures=0, max_preemptions=0, max_rewinds=2)
    numbers = Failure(cause="Rewind: step 4 is bad", kind="numbers", next_batch=5)
    assert not policy.give_up(numbers, 4, False), "a start may come upon them at once"
    assert not policy.give_up(numbers, 4, True), "another batch of the same step"
    assert policy.give_up(numbers, 4, True) == "train.rewinds=2 is used up"


def scaling(workers: int, nodes: int, batch: int, **parallel: object) -> ScalingPolicy:
    config = Config(
        train=TrainOptions(global_batch_size=batch, micro_batch_size=1),
        parallel=ParallelOptions(**parallel),
        checkpoint=CheckpointOptions(parity=2, snapshot_every_steps="1"),
        launch=LaunchOptions(workers=workers, nodes=nodes),
    )

    def settle(config: Config, crew: Crew) -> Config:
        config.micro_batches(crew.workers)
        return config

    return ScalingPolicy(config, Crew(workers, nodes, "cpu"), settle)


@pytest.mark.parametrize(("there", "nodes"), [(4, 4), (9, 4), (3, 2), (2, 2), (1, 1)])
def test_the_largest_crew_that_divides_the_batch(there: int, nodes: int) -> None:
    assert scaling(8, 4, 16).crew(there) == Crew(2 * nodes, nodes, "cpu")


def test_no_crew_where_nothing_divides() -> None:
    assert scaling(4, 2, 4, levels={"node": 1, "worker": 4}).crew(1) is None
    assert scaling(4, 4, 4).crew(0) is None


def test_what_was_said_of_all_nodes_is_said_of_fewer() -> None:
    policy = scaling(8, 4, 16, levels={"node": 4, "worker": 2})
    config = policy.config(Crew(4, 2, "cpu"))
    assert config.parallel.levels == {"node": 2, "worker": 2}
    assert config.checkpoint.parity == 1
