"""Jobs as a user of a cluster runs them: `ray job submit`, by the lines of docs/REFERENCE.md, from a folder of their own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from tests.support.local_head import LocalHead, local_head
from tests.support.tiny import tiny_tree, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(7200)]

ROOT = Path(__file__).parent.parent
REFERENCE = (ROOT / "docs" / "REFERENCE.md").read_text()
SUBMIT = re.search(r"`(ray job submit .*? -- )python -m jobs\.run_all --config FILE\s+run\.dir=URI`", REFERENCE)
LINES = dict(re.findall(r"^    python -m jobs\.(\w+) +(--config FILE(?: +[\w.]+=\S+)*)", REFERENCE, re.MULTILINE))
STAGES = ("build_corpus", "fit_clusters", "partition_corpus", "train_seed", "train_experts", "evaluate_mixture")
NEVER_UPLOADED = ("data.parquet", "weights.safetensors", "runs/old/report.html", ".env/lib/code.pyc")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHead]:
    with local_head(tmp_path_factory.mktemp("head")) as started:
        started.start(cpus=2)
        yield started


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks, a tiny configuration, and files that must stay at home."""
    folder = tmp_path_factory.mktemp("project")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    tree = tiny_tree(folder / "unused", write_corpus(folder.parent / "corpus"))
    (folder / "configs" / "tiny.yaml").write_text(yaml.safe_dump(tree))
    for name in NEVER_UPLOADED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def line(job: str, run_dir: Path | str, options: str = "") -> str:
    """The reference's own line for a job, for the tiny configuration."""
    assert SUBMIT, "the reference says how a job is submitted"
    said = (LINES[job] if job != "run_all" else "--config FILE").replace("FILE", "configs/tiny.yaml")
    submit = SUBMIT[1].replace("ray job submit ", f"ray job submit {options} ")
    return f"{submit}python -m jobs.{job} {said} run.dir={run_dir}"


def shell(command: str, project: Path, environment: dict[str, str]) -> SimpleNamespace:
    done = subprocess.run(["bash", "-c", command], cwd=project, env=environment, capture_output=True, text=True)
    return SimpleNamespace(code=done.returncode, said=done.stdout + done.stderr)


def job_info(head: LocalHead, submission_id: str) -> dict:
    return json.loads(head.ask(f"/api/jobs/{submission_id}"))


@pytest.fixture(scope="module")
def undisturbed(head: LocalHead, project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, each stage submitted as a job of its own."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    for job in STAGES:
        done = shell(line(job, run_dir), project, head.environment)
        assert done.code == 0, done.said
        assert "succeeded" in done.said
    return run_dir


def test_the_head_and_its_workers_listen_on_localhost_alone(head: LocalHead, project: Path, tmp_path: Path) -> None:
    done = shell(line("build_corpus", tmp_path / "run"), project, head.environment)
    assert done.code == 0, done.said
    listening = [
        connection.laddr.ip
        for process in head.processes()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_the_stages_one_by_one_make_the_whole_run(head: LocalHead, project: Path, undisturbed: Path) -> None:
    done = shell(line("run_all", undisturbed), project, head.environment)
    assert done.code == 0, done.said
    assert done.said.count("already done") == 7
    assert "dense control" in done.said


@pytest.mark.parametrize("job", ["average_experts", "make_fewshot_task", "plan_run"])
def test_what_is_done_on_request(head: LocalHead, project: Path, undisturbed: Path, job: str) -> None:
    done = shell(line(job, undisturbed), project, head.environment)
    assert done.code == 0, done.said


def test_a_mistake_ends_with_2_and_a_line_that_names_it(head: LocalHead, project: Path, tmp_path: Path) -> None:
    command = line("build_corpus", tmp_path / "run", "--submission-id mistaken") + " corpus.text_column=body"
    done = shell(command, project, head.environment)
    assert done.code == 1  # of Ray's command line, whatever the job's own code
    info = job_info(head, "mistaken")
    assert info["driver_exit_code"] == 2
    assert "error: " in done.said
    assert "Set corpus.text_column to one of these." in done.said


@pytest.mark.parametrize(("token", "said"), [(None, "Authentication required"), ("0" * 64, "Authentication failed")])
def test_no_token_or_a_wrong_one_is_refused(
    head: LocalHead, project: Path, tmp_path: Path, token: str | None, said: str
) -> None:
    environment = {name: value for name, value in head.environment.items() if not name.startswith("RAY_AUTH")}
    if token:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    done = shell(line("build_corpus", tmp_path / "run", "--submission-id refused"), project, environment)
    assert done.code != 0
    assert said in done.said
    assert not (tmp_path / "run").exists()
    assert all(job["submission_id"] != "refused" for job in json.loads(head.ask("/api/jobs/")))


def test_only_code_and_configurations_are_uploaded(head: LocalHead, undisturbed: Path) -> None:
    folders = [path for path in head.temp_dir.glob("session_*/runtime_resources/working_dir_files/*") if path.is_dir()]
    assert folders
    for folder in folders:
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert {"jobs/run_all.py", "cbtm_ray/run.py", "configs/tiny.yaml", "ops/gguf.py", "serve/app.py"} <= there
        assert not there & {*NEVER_UPLOADED, "ops/grafana.json"}
        assert not {name.split("/")[0] for name in there} & {"tests", "docs", "benchmarks", "kuberay", ".git"}
