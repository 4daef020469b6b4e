"""The file of failures: what is appended is read back, and a torn line is passed over."""

import json
from pathlib import Path

from launch.failures import FailureRecord

RECORD = FailureRecord(
    time=1.5,
    cause="process",
    what="its process (pid 7) died",
    rank=1,
    node="127.0.0.1",
    found_s=0.1,
    restored_from="memory",
    step=9,
    resumed_step=9,
    steps_lost=0,
    recover_s=2.5,
    world_before=2,
    world_after=2,
)


def test_records_come_back_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "failures.jsonl"
    assert FailureRecord.read(file) == []
    RECORD.append(file)
    RECORD.append(file)
    assert json.loads(file.read_text().splitlines()[0])["from"] == "memory"
    with file.open("a") as torn:
        torn.write('{"time": 3')
    assert FailureRecord.read(file) == [RECORD, RECORD]
