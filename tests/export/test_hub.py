"""The folder to publish: it loads without this project, picks the same experts, and arrives at the Hub as it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from cbtm_ray.corpus.tokenizer import encode
from cbtm_ray.errors import UserError
from cbtm_ray.export.hub import export_hub, main
from cbtm_ray.merge.ensemble import load_ensemble
from cbtm_ray.run import Run
from tests.support.hub_server import Hub, hub_server
from tests.support.tiny import DOMAINS

pytestmark = pytest.mark.ray
FORBIDDEN = """
import sys
sys.modules.update(dict.fromkeys(["cbtm_ray", "ray", "torch", "scipy", "sklearn"]))
import json
sys.path.insert(0, sys.argv[1])
from load_router import Router
router = Router(sys.argv[1] + "/router")
print(json.dumps([router.scores(tokens).tolist() for tokens in json.loads(sys.stdin.read())]))
"""


@pytest.fixture(scope="module")
def run_dir(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("published") / "run"
    shutil.copytree(finished_run.dir, folder, ignore=shutil.ignore_patterns("checkpoints", "corpus", "export"))
    return str(folder)


@pytest.fixture(scope="module")
def folder(run_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hub") / "folder"
    assert export_hub(run_dir, made, license_id="apache-2.0") == ["experts", "router"]
    return made


@pytest.mark.parametrize("settings", [{}, {"beta": 0.5, "gamma": 0.9}, {"beta": 0.3, "gamma": 1.0, "temperature": 0.2}])
def test_the_router_is_ours_with_numpy_alone(run_dir: str, settings: dict[str, float], tmp_path: Path) -> None:
    if settings:
        copied = tmp_path / "run"
        shutil.copytree(run_dir, copied)
        path = copied / "evaluation" / "results.json"
        results = json.loads(path.read_text())
        results["routers"]["ngram"]["1"] = settings
        path.write_text(json.dumps(results))
        run_dir = str(copied)
    export_hub(run_dir, tmp_path / "made", "router")
    ensemble, tokenizer = load_ensemble(run_dir, [])
    texts = [*DOMAINS.values(), "a", *(text[40:90] for text in DOMAINS.values())]
    token_ids = [[], *(tokens.tolist() for tokens in encode(tokenizer, texts))]
    program = [sys.executable, "-c", FORBIDDEN, str(tmp_path / "made")]
    found = subprocess.run(program, input=json.dumps(token_ids), capture_output=True, text=True, check=True).stdout
    for tokens, scores_K in zip(token_ids, json.loads(found), strict=True):
        router = ensemble.router(1, range(ensemble.n_experts))
        router.append(tokens)
        np.testing.assert_allclose(scores_K, router._scores(), rtol=1e-4, atol=1e-4)
        assert int(np.argmax(scores_K)) == router.running[0]


def test_experts_load_and_their_cards_say_what_they_are(folder: Path, run_dir: str) -> None:
    ours = AutoModelForCausalLM.from_pretrained(f"{run_dir}/experts/cluster=0001").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(folder / "experts" / "cluster=0001").state_dict()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    manifest = json.loads(Path(run_dir, "experts", "cluster=0001", "manifest.json").read_text())
    terms = json.loads(Path(run_dir, "clusterer", "manifest.json").read_text())["clusters"][1]["top_terms"]
    expert = (folder / "experts" / "cluster=0001" / "README.md").read_text()
    for text in (card.text, expert):
        assert f"{manifest['train_tokens']:,}" in text
        assert ", ".join(terms) in text
    assert "dense control" in card.text
    assert not list(folder.rglob("manifest.json")), "manifests name the machines of the run"
    assert run_dir not in "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".md", ".json"))


def test_what_the_run_lacks_is_named(run_dir: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--parts=moe: this run has experts, router"):
        export_hub(run_dir, tmp_path / "new", "experts,moe")
    with pytest.raises(UserError, match=r"--parts=everything: choose from experts, router, moe, adapters"):
        export_hub(run_dir, tmp_path / "new", "everything")
    with pytest.raises(UserError, match="is there already"):
        export_hub(run_dir, folder)
    with pytest.raises(UserError, match="is not a finished run"):
        export_hub(str(tmp_path), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server("a-token") as started:
        yield started


def push(hub: Hub, run_dir: str, folder: Path, token: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "jobs.export_hub", str(folder), "--run", run_dir, "--push", "me/experts"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_what_is_pushed_arrives_byte_by_byte(hub: Hub, run_dir: str, tmp_path: Path) -> None:
    pushed = push(hub, run_dir, tmp_path / "pushed", "a-token")
    assert pushed.returncode == 0, pushed.stderr
    assert f"{hub.url}/me/experts" in pushed.stdout
    sent = {str(path.relative_to(tmp_path / "pushed")): path.read_bytes() for path in (tmp_path / "pushed").rglob("*.*")
            if path.is_file()}  # fmt: skip
    assert {name: content for name, content in hub.files["me/experts"].items() if name != ".gitattributes"} == sent


def test_a_hub_that_refuses_is_one_line(hub: Hub, run_dir: str, tmp_path: Path) -> None:
    refused = push(hub, run_dir, tmp_path / "refused", "another-token")
    assert refused.returncode == 2
    assert "--push=me/experts: the Hub cannot be written to" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("", [str(tmp_path / "new"), "--run", str(tmp_path)]) == 2
    assert "is not a finished run" in capsys.readouterr().err
