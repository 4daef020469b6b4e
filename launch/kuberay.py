"""The manifest of ``atoll submit kuberay``: a RayJob, which makes a Ray cluster, runs the job and ends both.

Source: the fields of ``ray.io/v1`` as KubeRay 1.5.1 and later document them.
"""

import argparse
import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launch.submission import OVERRIDES, RUNS, Submission, Target, check_label

if TYPE_CHECKING:
    from launch.config import Config


def kuberay(target: Target, config: "Config") -> Submission:
    """The manifest of a RayJob, and kubectl for it."""
    options = target.options
    name = options.name or re.sub(r"[^a-z0-9]+", "-", config.run_name.lower()).strip("-")[:41].strip("-")
    check_label("--name", name)
    notes = []
    if not options.pvc and not any(o.startswith("checkpoint.url=") for o in target.overrides):
        notes.append(f"without --pvc the run lies in its pods and goes with them; --pvc CLAIM mounts a claim at {RUNS}")
    text = "# Written by atoll submit kuberay. KubeRay 1.5.1 or newer.\n" + yaml.safe_dump(
        manifest(name, target), sort_keys=False, width=1000
    )
    file = Path(config.run.root if not options.pvc else "runs", config.run_name, "submit", "kuberay.yaml").absolute()
    return Submission(file, text, ["kubectl", "apply", "-f", str(file)], notes)


def manifest(name: str, target: Target) -> dict[str, Any]:
    """The RayJob as plain data: one head without resources for workers, and a group of `nodes` worker pods."""
    options = target.options
    # JSON without a dollar sign passes Kubernetes' own expansion, and no shell reads it
    words = json.dumps(target.overrides).replace("$", "\\u0024")
    head = _pod(options, {"cpu": "2", "memory": "8Gi"}, "2Gi", [{"name": OVERRIDES, "value": words}])
    limits = {"cpu": str(options.cpus_per_node), "memory": options.memory_per_node}
    limits |= {"nvidia.com/gpu": str(options.gpus_per_node)} if options.gpus_per_node else {}
    cluster = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0", "num-gpus": "0"}, "template": head},
        "workerGroupSpecs": [
            {
                "groupName": "nodes",
                "replicas": options.nodes,
                "minReplicas": options.nodes,
                "maxReplicas": options.nodes,
                "rayStartParams": {},
                "template": _pod(options, limits, options.shm, []),
            }
        ],
    }
    command = f"{shlex.quote(options.python)} -P -m launch.node"
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": options.namespace},
        "spec": {
            "entrypoint": f"{command} job --nodes {options.nodes} --wait-s {options.wait_s:g}",
            "backoffLimit": options.max_restarts,
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "rayClusterSpec": cluster,
        },
    }


def _pod(
    options: argparse.Namespace, resources: dict[str, str], shm: str, environment: list[dict[str, str]]
) -> dict[str, Any]:
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shm}}]
    if options.pvc:
        mounts.append({"name": "runs", "mountPath": RUNS})
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": options.pvc}})
    container = {
        "name": "ray",
        "image": options.image,
        "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}, *environment],
        "resources": {"limits": resources, "requests": dict(resources)},
        "volumeMounts": mounts,
    }
    return {"spec": {"containers": [container], "volumes": volumes}}
