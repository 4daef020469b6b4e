"""Random generators go on where they were."""

import random

import numpy as np
import torch

from checkpoint import rng_state, set_rng_state, values


def test_all_generators_go_on_after_a_trip_through_json():
    random.gauss(0, 1)  # leaves a second value cached, as numpy's does
    np.random.standard_normal()
    content = values.dumps(rng_state())

    def draw():
        return torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist()

    expected = draw()
    draw()
    set_rng_state(values.loads(content))
    assert draw() == expected
