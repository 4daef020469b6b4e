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


def test_words_that_were_saved_one_by_one_are_read():
    state = rng_state()
    state["python"] |= {"words": list(random.getstate()[1])}
    expected = random.random()
    set_rng_state(values.loads(values.dumps(state)))
    assert random.random() == expected
