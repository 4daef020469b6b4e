"""Whether a node is there."""

import resource
import socket

from launch.places import Node, is_there


def test_a_refusal_is_a_death_and_want_of_descriptors_here_is_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        node = Node("n", "127.0.0.1", server.getsockname()[1])
        assert is_there(node)
    assert not is_there(node)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        there = is_there(node)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert there
