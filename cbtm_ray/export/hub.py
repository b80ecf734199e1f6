"""Job `export_hub`: a folder that anybody can publish, and load without this project; and its upload to the Hub."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from cbtm_ray import files
from cbtm_ray.errors import UserError, refuse
from cbtm_ray.export.cards import expert_card, license_of, run_card
from cbtm_ray.export.published_router import write_router
from cbtm_ray.load_config import load_config
from cbtm_ray.merge.ensemble import served_route
from cbtm_ray.stages import expert_folder

PARTS = {"experts": "experts", "router": "clusterer", "moe": "export/moe", "adapters": "export/adapters"}
"""What a folder can have, and the stage that has to be finished for it."""
KEPT_BACK = "manifest.json"
"""Of the run, with names of its machines."""


def main(description: str, arguments: list[str] | None = None) -> int:
    """Write the folder, and push it if asked; exit code 0, or 2 with one line for a user's mistake."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", metavar="FOLDER", help="a local folder that is not there yet")
    parser.add_argument("--run", required=True, metavar="RUN", help="directory of a finished run, a path or URI")
    parser.add_argument("--parts", help=f"of {', '.join(PARTS)}, with commas between (all that the run has)")
    parser.add_argument("--license", metavar="ID", help="the Hub's name of a license (that of the seed's card)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload to this repository of the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    options = parser.parse_args(arguments)
    try:
        parts = export_hub(options.run, Path(options.folder), options.parts, options.license)
        print(f"{options.folder}: {', '.join(parts)}. Look at README.md before you publish it.")
        if options.push:
            print(push(Path(options.folder), options.push, private=options.private))
    except UserError as error:
        return refuse(str(error))
    return 0


def export_hub(run_dir: str, folder: Path, wanted: str | None = None, license_id: str | None = None) -> list[str]:
    """Write the parts of a run with their cards to a folder; the parts.

    Raises:
        UserError: the run is not finished, lacks a part that was named, or the folder is there already.
    """
    if folder.exists():
        raise UserError(f"FOLDER={folder} is there already. Delete it, or name another.")
    served_route(run_dir)  # refuses a run that is not finished
    parts = _parts(run_dir, wanted)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        made = Path(aside) / folder.name
        made.mkdir()
        _write(run_dir, made, parts, license_id)
        made.rename(folder)
    return parts


def _parts(run_dir: str, wanted: str | None) -> list[str]:
    """The parts that are asked for; without a word those that the run has."""
    has = [
        part for part, stage in PARTS.items() if files.exists(files.join(run_dir, *stage.split("/"), "manifest.json"))
    ]
    asked = has if wanted is None else [part.strip() for part in wanted.split(",")]
    for part in asked:
        if part not in has:
            known = f"this run has {', '.join(has)}" if part in PARTS else f"choose from {', '.join(PARTS)}"
            raise UserError(f"--parts={part}: {known}. See docs/REFERENCE.md for the job that makes it.")
    return asked


def _write(run_dir: str, folder: Path, parts: list[str], license_id: str | None) -> None:
    with files.local_folder(files.join(run_dir, "clusterer")) as clusterer:
        clusters = {row["cluster"]: row for row in files.read_json(f"{clusterer}/manifest.json")["clusters"]}
    shards = files.read_json(files.join(run_dir, "shards", "manifest.json"))["train"]["clusters"]
    documents = {row["cluster"]: row["documents"] for row in shards}
    config = load_config(files.join(run_dir, "config.yaml"), [])
    license_id = license_id or license_of(config)
    experts = [
        {**_trained(run_dir, cluster), "documents": documents[cluster], "top_terms": clusters[cluster]["top_terms"]}
        for cluster in sorted(clusters)
    ]
    for part in parts:
        if part == "experts":
            for expert in experts:
                to = _copy(
                    files.join(run_dir, expert_folder(expert["cluster"])), folder / expert_folder(expert["cluster"])
                )
                (to / "README.md").write_text(expert_card(config, expert, license_id), encoding="utf-8")
        elif part == "router":
            write_router(run_dir, folder / "router")
            shutil.copy(Path(__file__).with_name("load_router.py"), folder / "load_router.py")
        elif part == "moe":
            _copy(files.join(run_dir, "export", "moe", "model"), folder / "moe")
        else:
            _write_adapters(run_dir, folder / "adapters")
    rows = files.read_json(files.join(run_dir, "evaluation", "results.json"))["rows"]
    (folder / "README.md").write_text(run_card(config, rows, experts, parts, license_id), encoding="utf-8")


def _write_adapters(run_dir: str, folder: Path) -> None:
    """The adapters, and the seed beside them, which they name as their base model instead of its place in the run."""
    _copy(files.join(run_dir, "export", "adapters"), folder)
    _copy(files.join(run_dir, "seed"), folder / "seed")
    for path in folder.glob("cluster=*/adapter_config.json"):
        files.write_json(str(path), {**files.read_json(str(path)), "base_model_name_or_path": "adapters/seed"})


def _trained(run_dir: str, cluster: int) -> dict[str, Any]:
    manifest = files.read_json(files.join(run_dir, expert_folder(cluster), "manifest.json"))
    return {name: manifest[name] for name in ("cluster", "train_tokens", "valid_loss_nats")}


def _copy(uri: str, to: Path) -> Path:
    """A folder of the run, without its manifests."""
    with files.local_folder(uri) as source:
        shutil.copytree(source, to, ignore=shutil.ignore_patterns(KEPT_BACK))
    return to


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder to the Hub; the repository's address.

    Raises:
        UserError: there is no token or no network, or the Hub refuses.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Experts and router"))
    except LocalTokenNotFoundError:
        raise UserError(f"--push={repository} needs a token of the Hub. Run: hf auth login") from None
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"--push={repository}: the Hub cannot be written to: {first}") from error
