"""The folder to publish: it loads without this project, picks the same experts, and arrives at the Hub as it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM

from cbtm_ray.corpus.tokenizer import encode
from cbtm_ray.errors import UserError
from cbtm_ray.export.cards import run_card
from cbtm_ray.export.hub import export_hub, main
from cbtm_ray.load_config import load_config
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


def test_settings_of_the_run_stay_back_with_the_seed_and_the_adapters(run_dir: str, tmp_path: Path) -> None:
    copied, adapter = tmp_path / "run", tmp_path / "run" / "export" / "adapters" / "cluster=0000"
    shutil.copytree(run_dir, copied)
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": f"{run_dir}/seed"}))
    for name in ("settings.json", "manifest.json"):
        shutil.copy(copied / "seed" / name, adapter.parent)
    assert "corpus.paths" in (copied / "seed" / "settings.json").read_text()
    assert export_hub(str(copied), tmp_path / "made", "adapters,adapters") == ["adapters"]
    made = sorted(path.relative_to(tmp_path / "made") for path in (tmp_path / "made").rglob("*.json"))
    assert Path("adapters/seed/config.json") in made
    assert Path("adapters/cluster=0000/adapter_config.json") in made
    assert not {"settings.json", "manifest.json"} & {path.name for path in made}
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "made").rglob("*.json"))


def test_the_card_says_what_the_router_lacks_and_how_one_expert_does(run_dir: str, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run_dir, copied)
    results = json.loads((copied / "evaluation" / "results.json").read_text())
    results["routers"]["ngram"]["1"] = {"beta": 0.3, "gamma": 1.0, "temperature": 0.2}
    for row in results["rows"]:
        row.pop("served", None)
    by_ngrams = {row["top_k"]: row for row in results["rows"] if (row["system"], row["routing"]) == ("cbtm", "ngram")}
    by_ngrams[2]["served"] = True
    (copied / "evaluation" / "results.json").write_text(json.dumps(results))
    embedder = copied / "clusterer" / "embedder" / "embedder.json"
    embedder.write_text(json.dumps({**json.loads(embedder.read_text()), "embedder": "word_tfidf"}))
    export_hub(str(copied), tmp_path / "made")
    card = ModelCard.load(tmp_path / "made" / "README.md").text
    assert "lacks the distances to the centers, which need the embedder 'word_tfidf'" in card
    assert all(f"{by_ngrams[top_k]['ppl']:.2f}" in card for top_k in (1, 2))


@pytest.mark.parametrize("name", ["/models/of/mine", "OWNER/seed"])
def test_a_place_is_no_base_model(name: str, run_dir: str, folder: Path) -> None:
    config = load_config(f"{run_dir}/config.yaml", [f"seed_model.name_or_path={name}"])
    card = run_card(config, [], [], ["experts"], None)
    assert ModelCard(card).data.base_model == (None if name.startswith("/") else name)
    assert "/models/of" not in card


def test_what_the_run_lacks_is_named(run_dir: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--parts=moe: this run has experts, router"):
        export_hub(run_dir, tmp_path / "new", "experts,moe")
    with pytest.raises(UserError, match=r"--parts=everything: choose from experts, router, moe, adapters"):
        export_hub(run_dir, tmp_path / "new", "everything")
    with pytest.raises(UserError, match="is there already"):
        export_hub(run_dir, folder)
    with pytest.raises(UserError, match="is not a finished run"):
        export_hub(str(tmp_path), tmp_path / "new")
    with pytest.raises(UserError, match="must be a local folder"):
        export_hub(run_dir, Path("s3://bucket/new"))
    with pytest.raises(UserError, match=r"--run=nowhere://run cannot be reached"):
        export_hub("nowhere://run", tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"FOLDER=.* cannot be reached"):
        export_hub(run_dir, tmp_path / "file" / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server("a-token") as started:
        yield started


def test_what_is_pushed_arrives_byte_by_byte(hub: Hub, run_dir: str, tmp_path: Path) -> None:
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "a-token",
        "HF_HUB_OFFLINE": "0",
    }
    folder = tmp_path / "pushed"
    command = [sys.executable, "-m", "jobs.export_hub", str(folder), "--run", run_dir, "--push", "me/experts"]
    pushed = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert pushed.returncode == 0, pushed.stderr
    assert f"{hub.url}/me/experts" in pushed.stdout
    sent = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {name: content for name, content in hub.files["me/experts"].items() if name != ".gitattributes"} == sent
    by_lfs = {content for name, content in sent.items() if name.endswith((".safetensors", ".npz"))}
    assert by_lfs == set(hub.objects.values())


@pytest.fixture
def push(hub: Hub, run_dir: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command in this process: its exit code. The client reads its environment when it is imported."""

    def run(folder: Path, *more: str, url: str = hub.url, token: str = "a-token") -> int:
        monkeypatch.setenv("HF_TOKEN", token)
        for name, value in {"ENDPOINT": url, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, name, value)
        return main("", [str(folder), "--run", run_dir, "--push", "me/new", *more])

    return run


def test_a_hub_that_refuses_or_is_not_there_is_one_line_and_the_folder_can_be_pushed_later(
    hub: Hub, push: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    for given in ({"token": "another-token"}, {"url": "http://127.0.0.1:9"}):
        assert push(folder, "--parts", "router", **given) == 2
        assert capsys.readouterr().err.startswith("error: --push=me/new: the Hub cannot be written to")
    with (folder / "README.md").open("a") as card:
        card.write("A word of the publisher's.\n")
    assert push(folder) == 0
    assert hub.files["me/new"]["README.md"] == (folder / "README.md").read_bytes()
    assert push(tmp_path) == 2
    assert "is there already" in capsys.readouterr().err, "a folder that is not ours is not uploaded"


@pytest.mark.parametrize("metadata", ["tags: [unclosed", "only a sentence"])
def test_a_card_that_an_editor_broke_is_one_line(
    metadata: str, push: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    assert push(tmp_path) == 2
    assert "the metadata of README.md cannot be read" in capsys.readouterr().err


def test_private_is_not_what_is_public_already(
    hub: Hub, push: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files["me/new"], hub.private["me/new"] = {}, False
    assert push(folder, "--private") == 2
    assert "is public already" in capsys.readouterr().err
    assert not hub.files["me/new"]
    del hub.files["me/new"], hub.private["me/new"]
    assert push(folder, "--private") == 0
    assert hub.private["me/new"]


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("", [str(tmp_path / "new"), "--run", str(tmp_path)]) == 2
    assert "is not a finished run" in capsys.readouterr().err
