"""How a worker's process ended, as Ray tells it."""

import time
from collections.abc import Iterator

import pytest
import ray

from launch.member import Member, failure_of
from launch.places import Node

pytestmark = pytest.mark.ray


class Hog:
    """As a worker that takes more host memory than there is."""

    def take(self) -> None:
        memory = bytearray(512 << 20)
        memory[:: 4 << 10] = b"x" * (len(memory) >> 12)
        time.sleep(60)


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster whose nodes are always short of memory."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


def test_a_process_that_ray_kills_for_its_memory_has_died_as_any_other(short_of_memory: None) -> None:
    """Ray raises no RayActorError then."""
    actor = ray.remote(num_cpus=0)(Hog).remote()
    failure = failure_of(actor.take.remote(), Member(actor, Node("id", "here", 1), None, None, pid=5))
    assert failure is not None and failure.kind == "process"
    assert "(pid 5) died" in failure.cause and "low on memory" in failure.cause and "\n" not in failure.cause
