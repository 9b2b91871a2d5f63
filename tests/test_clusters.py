"""What is handed to batch systems: scripts that parse, and commands that the programs understand."""

import shlex
import subprocess
import sys
from pathlib import Path

import yaml
from torch.distributed.run import get_args_parser

sys.path.insert(0, str(Path(__file__).parent))
from test_readme import PROGRAMS, ROOT

CLUSTERS = ROOT / "docs/clusters"


def read_torchrun(words: list[str]) -> tuple[object, list[str]]:
    """Options of torchrun, and the words of the program that it starts; both understood, or SystemExit."""
    said = get_args_parser().parse_args(words)
    assert said.module
    return said, [said.training_script, *said.training_script_args]


def test_the_job_of_slurm_starts_one_torchrun_on_each_host():
    script = CLUSTERS / "train.slurm"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text(encoding="utf-8").replace("\\\n", " ")
    assert "#SBATCH --ntasks-per-node=1\n" in text
    line = next(line for line in text.splitlines() if line.lstrip().startswith("srun "))
    words = shlex.split(line.replace('"$SLURM_NNODES"', "2").replace('"${SLURM_GPUS_ON_NODE:-1}"', "8"))
    said, program = read_torchrun(words[words.index("torchrun") + 1 : words.index("&")])
    assert (said.nnodes, said.nproc_per_node, said.rdzv_backend) == ("2", "8", "c10d")
    assert program == ["mm_train", "$@"]


def test_the_job_of_kubernetes_is_one_that_trains():
    service, job = yaml.safe_load_all((CLUSTERS / "train.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    said, program = read_torchrun(container["command"][1:])
    assert program == ["mm_train"]
    PROGRAMS["mm_train"](container["args"])
    hosts = job["spec"]["completions"]
    assert hosts == job["spec"]["parallelism"] == int(said.nnodes)
    assert int(said.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    name = job["metadata"]["name"]
    assert said.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:29500"  # as pods of an indexed Job are called
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    patience = next(int(one["value"]) for one in container["env"] if one["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert patience < pod["terminationGracePeriodSeconds"]
    mounted, volumes = (
        {one["name"] for one in held["volumeMounts" if held is container else "volumes"]} for held in (container, pod)
    )
    assert mounted == volumes
    folders = [one["mountPath"] for one in container["volumeMounts"]]
    paths = [arg.split("=")[1] for arg in container["args"] if arg.split("=")[1].startswith("/")]
    assert len(paths) == 3
    assert all(any(path.startswith(f"{folder}/") for folder in folders) for path in paths)


def test_the_images_install_every_package_at_the_pinned_release():
    text = (ROOT / ".ci/Dockerfile").read_text(encoding="utf-8")
    packages = {f"{path.parent.parent.name}/{path.parent.name}" for path in ROOT.glob("*/*/pyproject.toml")}
    pinned = next(
        line for line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines() if "TORCH_RELEASE:" in line
    )
    release = pinned.split("TORCH_RELEASE:")[1].split("}")[0]
    for target in ("cpu", "cuda"):
        stage = text.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert f"torch=={release}" in stage
        assert packages == set(
            next(line for line in stage.splitlines() if "libs/mm-parallel" in line).split(" && ")[0].split()[3:]
        )
