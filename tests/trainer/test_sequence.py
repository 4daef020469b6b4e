"""A run that shares sequences over two ranks, of uneven parts, with activations that leave."""

import json
import re

import pytest

from tests.scripts import lines_of


@pytest.mark.slow
def test_losses_are_those_of_one_rank_and_swapping_changes_no_bit() -> None:
    """Of two micro-batches a step; by tiles to rounding, and both ways of that alike. Steps of states that are away are
    predicted, with what attention sends."""
    lines = [
        json.loads(line) for line in lines_of("tests/trainer/sequence_run.py", timeout_s=110) if line.startswith("[")
    ]
    found, told = ({line[0]: line[part] for line in lines} for part in (1, 2))
    away = ["states away", "predicted", "states auto"]
    assert list(found) == ["alone", "keep", "swap 1", "swap 0", "stream", "stream_input", "auto", *away, "uneven"]
    assert len(found["alone"]) == 3 + 2, "steps, and validations before and after"
    assert found["keep"] == pytest.approx(found["alone"], rel=1e-6)
    assert found["swap 1"] == found["keep"] == found["swap 0"]
    assert found["states away"] == found["predicted"], "a prediction changes nothing"
    assert found["states auto"] == pytest.approx(found["predicted"], rel=1e-6), "a part is updated on the device"
    assert found["states away"][:3] == pytest.approx(found["alone"][:3], rel=1e-6), "then the schedule is another"
    assert "predicted: " not in told["states away"]
    for name in away[1:]:
        assert "without what ranks send each other but for attention" in told[name]
        ratio = re.search(r"measured: .* ([\d.]+) of what was predicted", told[name])
        assert ratio and 0.8 < float(ratio[1]) < 1.3, f"of two passes in a forward and four in a backward: {told[name]}"
    assert "offload.states=auto: offload.states=host" in told["states auto"]
    assert "activations: 3 blocks swap" in told["uneven"], "as many keep on all ranks"
    assert found["uneven"] == pytest.approx(found["states away"], rel=1e-6)
    assert found["stream"] == found["stream_input"] == found["auto"] == pytest.approx(found["alone"], rel=1e-6)
