"""``atoll submit``: what is written and run, as it is shown and as bash, YAML and the programs read it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.config import Config
from launch.kuberay import kuberay, manifest
from launch.submit import Submission, parse, slurm, ssh

NASTY = ['run.name=it\'s "$HOME" `x` !', "data.paths=[a b,$(touch broken),c\\d]", "model.name=*\n;é"]
SLURM = "slurm --nodes 4 --gpus-per-node 8 --time 24:00:00".split()
SSH = "ssh --hosts one,two,three".split()
BATCH = ["--", "train.global_batch_size=96"]
"""That divides over the workers of all of these."""
KUBERAY = "kuberay --nodes 4 --gpus-per-node 8 --image registry/atoll:1".split()


def rendered(*args: str) -> Submission:
    target = parse(list(args))
    make = {"slurm": slurm, "ssh": ssh, "kuberay": kuberay}[target.kind]
    return make(target, Config())


@pytest.mark.parametrize("typed", [SLURM, SSH], ids=["slurm", "ssh"])
def test_the_script_is_sound_bash(typed: list[str], tmp_path: Path) -> None:
    made = rendered(*typed, "--", *NASTY)
    script = tmp_path / "script.sh"
    script.write_text(made.text)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        said = subprocess.run(["shellcheck", "--severity=warning", script], capture_output=True, text=True)
        assert said.returncode == 0, said.stdout


def test_a_node_that_is_started_again_and_again_leaves_no_pipe_open() -> None:
    """A lost node is tried every 15 s, for days: the script has as few descriptors as at first."""
    functions = rendered(*SSH).text.partition("\nfailures=")[0]
    lost = "on() { return 1; }; token=t; count() { set -- /proc/$$/fd/*; echo $#; }; begin_node 1; count\n"
    again = 'for n in {1..9}; do begin_node 1; wait "${process[node-1]}"; done; count'
    shown = subprocess.run(["bash", "-c", f"{functions}\n{lost}{again}"], capture_output=True, text=True, check=True)
    first, last = shown.stdout.split()
    assert first == last


@pytest.mark.parametrize("typed", [SLURM, SSH], ids=["slurm", "ssh"])
def test_bash_reads_the_overrides_as_typed(typed: list[str], tmp_path: Path) -> None:
    settings = rendered(*typed, "--", *NASTY).text.partition("\njob=")[0]
    shown = subprocess.run(
        ["bash", "-c", settings + '\nprintf "%s\\0" "${overrides[@]}"'], capture_output=True, check=True, cwd=tmp_path
    )
    assert shown.stdout.decode().split("\0")[-4:-1] == NASTY
    assert not list(tmp_path.iterdir())


def test_a_remote_shell_reads_the_words_as_typed(tmp_path: Path) -> None:
    """`on` as the script has it, with an ssh that gives its last argument to a shell, as sshd does."""
    fake = tmp_path / "ssh"
    fake.write_text('#!/bin/sh\nexec /bin/sh -c "$(for last; do :; done; printf "%s" "$last")"\n')
    fake.chmod(0o755)
    folder = tmp_path / "the user's $folder"
    folder.mkdir()
    text = rendered(*SSH, "--folder", str(folder)).text
    functions = text.partition("\n# From here on")[0]
    shown = subprocess.run(
        ["bash", "-c", f'{functions}\non one printf "%s\\0" "$PWD" "$@"', "bash", *NASTY],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        check=True,
    )
    assert shown.stdout.decode().split("\0")[1:-1] == NASTY


def test_sbatch_is_told_what_was_asked() -> None:
    made = rendered(*SLURM, "--partition", "gpu", "--account", "me", "--signal-s", "90", "--sbatch=--qos=high")
    directives = [line.removeprefix("#SBATCH ") for line in made.text.splitlines() if line.startswith("#SBATCH")]
    state = Path("runs/model-stdlib/submit").absolute()
    for wanted in (
        *("--nodes=4", "--gpus-per-node=8", "--time=24:00:00", "--partition=gpu", "--account=me", "--requeue"),
        *("--signal=B:TERM@90", "--open-mode=append", "--ntasks-per-node=1", "--exclusive", "--qos=high"),
        f"--output={state}/slurm-%j.log",
    ):
        assert wanted in directives
    assert made.text.index(directives[-1]) < made.text.index("python=")  # sbatch stops reading at the first command
    assert made.command == ["sbatch", f"{state}/slurm.sh"]


def test_workers_follow_from_nodes_and_gpus_unless_given() -> None:
    assert parse([*SLURM, "--", "train.steps=3"]).overrides == ["launch.nodes=4", "launch.workers=32", "train.steps=3"]
    assert parse([*SSH, "--", "launch.workers=6"]).overrides == [
        "launch.nodes=3",
        "launch.device=cpu",
        "launch.workers=6",
    ]


def made_manifest(*args: str) -> dict:
    made = rendered(*KUBERAY, *args)
    found = yaml.safe_load(made.text)
    assert made.command == ["kubectl", "apply", "-f", str(made.file)]
    return found


def test_the_manifest_asks_for_the_nodes() -> None:
    job = made_manifest("--namespace", "team", "--pvc", "disk", "--shm", "32Gi", "--max-restarts", "5")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["metadata"] == {"name": "model-stdlib", "namespace": "team"}
    assert job["spec"]["backoffLimit"] == 5
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    [group] = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == 4
    [container] = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
    assert volumes["runs"]["persistentVolumeClaim"] == {"claimName": "disk"}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/dev/shm", "/runs"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_manifest_carries_the_overrides_past_kubernetes_expansion() -> None:
    import json

    [container] = made_manifest("--", *NASTY)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"][
        "containers"
    ]
    [words] = [item["value"] for item in container["env"] if item["name"] == "ATOLL_OVERRIDES"]
    assert "$" not in words
    assert json.loads(words)[-3:] == NASTY


def test_two_pods_share_no_node_of_the_document() -> None:
    """YAML's anchors would show; kubectl reads them, people do not."""
    assert "&id" not in yaml.safe_dump(manifest("a", parse(KUBERAY)))


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ([], ["choose slurm, ssh or kuberay"]),
        (["pbs"], ["'pbs'", "slurm"]),
        (["slurm", "--nodes", "2"], ["--time"]),
        (["slurm", "--nodes", "0", "--time", "1"], ["--nodes 0", "at least 1"]),
        ([*SLURM, "train.steps=3"], ["train.steps=3", "after --"]),
        ([*SLURM, "--", "train.steps"], ["'train.steps'", "key=value"]),
        ([*SLURM, "--", "--multirun=1"], ["--multirun=1", "key=value"]),
        ([*SLURM, "--", "launch.nodes=3"], ["launch.nodes=3", "leave it out"]),
        ([*SLURM, "--", "train.step=3"], ["train.step", "train.steps=3"]),
        ([*SLURM, "--name", 'a"b', "--dry-run", *BATCH], ["job-name", "sbatch"]),
        ([*SLURM, "--sbatch=qos", "--dry-run"], ["--sbatch 'qos'"]),
        (["ssh", "--hosts", "me@a,b"], ["--hosts 'me@a'", "--user"]),
        (["ssh", "--hosts", "a,a"], ["a,a", "once"]),
        ([*KUBERAY, "--shm", "lots"], ["--shm lots", "64Gi"]),
        ([*KUBERAY, "--namespace", "My_Team"], ["--namespace 'My_Team'"]),
        ([*SLURM, *BATCH], ["sbatch", "not here", "--dry-run"]),
        ([*SSH, *BATCH], ["ssh", "not here", "--dry-run"]),
        ([*KUBERAY, *BATCH], ["kubectl", "not here", "--dry-run"]),
    ],
    ids=lambda value: " ".join(value[:3]),
)
def test_what_is_wrong_is_one_sentence(
    typed: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    from launch import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch, ssh or kubectl
    monkeypatch.setattr(sys, "argv", ["atoll"])
    assert cli.submit(typed) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_all_and_changes_nothing(atoll, tmp_path: Path) -> None:
    done = atoll("submit", *SLURM, "--dry-run", *BATCH, "train.steps=3")
    assert done.returncode == 0, done.stderr
    state = tmp_path / "runs/tiny-stdlib/submit"
    assert f"# would write {state}/slurm.sh:" in done.stdout and f"# would run: sbatch {state}/slurm.sh" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.global_batch_size=30", "train.global_batch_size=30 must be divisible by .* launch.workers=32"),
        ("parallel.levels={node: 4, gpu: 4}", "multiply to 16, but launch.workers=32"),
        ("optimizer.momentum=0.5", "optimizer.momentum=0.5 is only read"),
    ],
)
def test_what_the_driver_would_refuse_is_refused_before_the_queue(override: str, words: str, atoll) -> None:
    done = atoll("submit", *SLURM, "--dry-run", *BATCH, override)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
    assert re.search(words, done.stderr), done.stderr
