"""The manifests for Kubernetes, against the schemas of its API and of Kubeflow Trainer's, and what they start."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from helpers import HANGS_AFTER_S

ROOT = Path(__file__).resolve().parents[2]
TRAINER, ELASTIC = ROOT / "launch" / "kubernetes.yaml", ROOT / "launch" / "kubernetes-elastic.yaml"
CRDS = "DIST_MNIST_TEST_CRDS"  # a folder with the CustomResourceDefinitions of Kubeflow Trainer
OPERATOR = {  # what its controller sets in the pod of node 1 of two
    "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": "1", "PET_MASTER_PORT": "29400",
    "PET_MASTER_ADDR": "dist-mnist-node-0-0.dist-mnist",
}  # fmt: skip


def documents(path: Path) -> dict[str, dict[str, Any]]:
    """The documents of a manifest, by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(path.read_text())}


@pytest.fixture
def train_job() -> dict[str, Any]:
    return documents(TRAINER)["TrainJob"]


@pytest.fixture
def node_patch(train_job) -> dict[str, Any]:
    """What the manifest changes of the pods that the runtime `torch-distributed` describes."""
    (patch,) = train_job["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert job["name"] == "node"
    return job["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_manifest_of_the_elastic_run_is_of_kubernetes_schemas(version):
    found = documents(ELASTIC)
    assert found.keys() == {"Service", "Deployment", "Job"}
    for document in found.values():
        kubernetes_validate.validate(document, version, strict=True)
    found["Job"]["spec"]["successPolicies"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):  # so that a misspelt field would be found
        kubernetes_validate.validate(found["Job"], version, strict=True)


def test_manifest_for_kubeflow_is_of_its_models(train_job):
    models = pytest.importorskip("kubeflow_trainer_api.models")
    read = models.TrainerV1alpha1TrainJob.from_dict(train_job)
    assert read.to_dict() == train_job, "no field is unknown"
    assert (read.api_version, read.spec.runtime_ref.name) == ("trainer.kubeflow.org/v1alpha1", "torch-distributed")


@pytest.mark.skipif(not os.environ.get(CRDS), reason=f"needs Kubeflow Trainer's CRDs: set {CRDS} to their folder")
def test_manifest_for_kubeflow_is_of_its_schema(train_job):
    (crd,) = yaml.load_all(
        (Path(os.environ[CRDS]) / "trainer.kubeflow.org_trainjobs.yaml").read_text(), yaml.CSafeLoader
    )
    (schema,) = [
        version["schema"]["openAPIV3Schema"]
        for version in crd["spec"]["versions"]
        if train_job["apiVersion"] == f"{crd['spec']['group']}/{version['name']}"
    ]
    jsonschema.validate(train_job, strict(schema))
    train_job["spec"]["trainer"]["numProcsPerNode"] = 1
    with pytest.raises(jsonschema.ValidationError, match="numProcsPerNode"):
        jsonschema.validate(train_job, strict(schema))


def strict(schema: Any) -> Any:
    """The schema, without what it says of unknown fields: there may be none. (A server would drop them.)"""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = {name: strict(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed.setdefault("additionalProperties", not schema["properties"])
    return closed


def test_pods_may_do_what_training_needs_and_no_more(node_patch):
    found = documents(ELASTIC)
    pods = [node_patch, *(found[kind]["spec"]["template"]["spec"] for kind in ("Deployment", "Job"))]
    for pod in pods:
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes.pop(mount["name"]) for mount in container["volumeMounts"]}
        assert not volumes and "emptyDir" in mounts["/tmp"]
        if pod is not pods[1]:
            assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory" and "/workspace" in mounts


def test_rendezvous_is_served_where_nodes_look_for_it():
    found = documents(ELASTIC)
    service, pod = found["Service"], found["Deployment"]["spec"]["template"]
    (container,), (port,) = pod["spec"]["containers"], service["spec"]["ports"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (listening,) = container["ports"]
    assert port["targetPort"] == listening["name"] and f"--port={listening['containerPort']}" in container["args"]
    (node,) = found["Job"]["spec"]["template"]["spec"]["containers"]
    assert f"--rdzv-endpoint={service['metadata']['name']}:{port['port']}" in node["args"]
    assert f"--nnodes=1:{found['Job']['spec']['completions']}" in node["args"]
    assert not service["spec"]["selector"].items() <= found["Job"]["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("manifest", [TRAINER, ELASTIC], ids=lambda path: path.stem)
def test_manifest_names_options_that_there_are(manifest, digits, tmp_path, train_job):
    job = documents(ELASTIC)["Job"]["spec"]["template"]["spec"]["containers"][0]
    container, env = (train_job["spec"]["trainer"], OPERATOR) if manifest == TRAINER else (job, {})
    assert container["command"] == ["dist-mnist", "train"]
    command = [sys.executable, "-m", "dist_mnist", "train", *container["args"], f"--data-dir={digits}", "--dry-run"]
    done = subprocess.run(
        [*command, "--device=cpu"], capture_output=True, text=True, timeout=HANGS_AFTER_S, cwd=tmp_path,
        env=os.environ | env,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "runs/kubernetes\n"), done.stderr
    assert not list(tmp_path.iterdir())
