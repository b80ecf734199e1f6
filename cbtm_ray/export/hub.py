"""Job `export_hub`: a folder that anybody can publish, and load without this project; and its upload to the Hub."""

from __future__ import annotations

import argparse
import errno
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # of the client that huggingface_hub brings, for a network that fails
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from yaml import YAMLError

from cbtm_ray import files
from cbtm_ray.errors import UserError, refuse
from cbtm_ray.export.cards import TAG, expert_card, license_of, run_card
from cbtm_ray.export.published_router import write_router
from cbtm_ray.load_config import load_config
from cbtm_ray.merge.ensemble import describe_clusters, served_route
from cbtm_ray.stages import expert_folder

PARTS = {"experts": "experts", "router": "clusterer", "moe": "export/moe", "adapters": "export/adapters"}
"""What a folder can have, and the stage that has to be finished for it."""
KEPT_BACK = ("manifest.json", "settings.json")
"""Of the run, with names of its machines, and of the places of its corpus."""


def main(description: str, arguments: list[str] | None = None) -> int:
    """Write the folder, and push it if asked; exit code 0, or 2 with one line for a user's mistake."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", metavar="FOLDER", help="a local folder; --push takes one that is there as it stands")
    parser.add_argument("--run", required=True, metavar="RUN", help="directory of a finished run, a path or URI")
    parser.add_argument("--parts", help=f"of {', '.join(PARTS)}, with commas between (all that the run has)")
    parser.add_argument("--license", metavar="ID", help="the Hub's name of a license (that of the seed's card)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload to this repository of the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    options = parser.parse_args(arguments)
    folder = Path(options.folder)
    try:
        if options.push and is_ours(folder):
            print(f"{folder} is there already, and pushed as it stands.")
        else:
            parts = export_hub(options.run, folder, options.parts, options.license)
            print(f"{folder}: {', '.join(parts)}. README.md is its card.")
        if options.push:
            print(push(folder, options.push, private=options.private))
    except UserError as error:
        return refuse(str(error))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return refuse(f"FOLDER={folder}: no space left on the device. Free some, or name another.")
    return 0


def is_ours(folder: Path) -> bool:
    """Whether a folder is one that `export_hub` finished: its card comes last, and says so.

    Raises:
        UserError: the card's metadata cannot be read.
    """
    card = folder / "README.md"
    try:
        return card.is_file() and TAG in (ModelCard(card.read_text(encoding="utf-8")).data.get("tags") or [])
    except (ValueError, YAMLError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"FOLDER={folder}: the metadata of README.md cannot be read: {said}. Mend it.") from error


def export_hub(run_dir: str, folder: Path, wanted: str | None = None, license_id: str | None = None) -> list[str]:
    """Write the parts of a run with their cards to a folder; the parts.

    Raises:
        UserError: the run is not finished, lacks a part that was named, or the folder is there already or is not local.
    """
    if ":/" in str(folder):
        raise UserError(
            f"FOLDER={folder} must be a local folder. Copy it from there, or upload it to the Hub with --push."
        )
    if folder.exists():
        raise UserError(f"FOLDER={folder} is there already. Delete it, or name another.")
    with files.reaching("--run", run_dir):
        served_route(run_dir)  # refuses a run that is not finished
    parts = _parts(run_dir, wanted)
    with files.reaching("FOLDER", str(folder)):
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
    asked = has if wanted is None else list(dict.fromkeys(part.strip() for part in wanted.split(",")))
    for part in asked:
        if part not in has:
            known = f"this run has {', '.join(has)}" if part in PARTS else f"choose from {', '.join(PARTS)}"
            raise UserError(f"--parts={part}: {known}. See docs/REFERENCE.md for the job that makes it.")
    return asked


def _write(run_dir: str, folder: Path, parts: list[str], license_id: str | None) -> None:
    config = load_config(files.join(run_dir, "config.yaml"), [])
    license_id = license_id or license_of(config)
    experts = [{**row, **_trained(run_dir, row["cluster"])} for row in describe_clusters(run_dir)]
    dropped = None
    for part in parts:
        if part == "experts":
            for expert in experts:
                to = _copy(
                    files.join(run_dir, expert_folder(expert["cluster"])), folder / expert_folder(expert["cluster"])
                )
                (to / "README.md").write_text(expert_card(config, expert, license_id), encoding="utf-8")
        elif part == "router":
            dropped = write_router(run_dir, folder / "router").get("dropped")
            shutil.copy(Path(__file__).with_name("load_router.py"), folder / "load_router.py")
        elif part == "moe":
            _copy(files.join(run_dir, "export", "moe", "model"), folder / "moe")
        else:
            _write_adapters(run_dir, folder / "adapters")
    rows = files.read_json(files.join(run_dir, "evaluation", "results.json"))["rows"]
    card = run_card(config, rows, experts, parts, license_id, dropped)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_adapters(run_dir: str, folder: Path) -> None:
    """The adapters, and the seed beside them, which they name as their base model instead of its place in the run."""
    _copy(files.join(run_dir, "export", "adapters"), folder)
    _copy(files.join(run_dir, "seed"), folder / "seed")
    for path in folder.glob("cluster=*/adapter_config.json"):
        files.write_json(str(path), {**files.read_json(str(path)), "base_model_name_or_path": "adapters/seed"})


def _trained(run_dir: str, cluster: int) -> dict[str, Any]:
    manifest = files.read_json(files.join(run_dir, expert_folder(cluster), "manifest.json"))
    return {name: manifest[name] for name in ("train_tokens", "valid_loss_nats")}


def _copy(uri: str, to: Path) -> Path:
    """A folder of the run, without what only the run needs."""
    with files.local_folder(uri) as source:
        shutil.copytree(source, to, ignore=shutil.ignore_patterns(*KEPT_BACK))
    return to


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder to the Hub; the repository's address.

    Raises:
        UserError: there is no token or no network, the Hub refuses, or `private` and the repository is public already.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UserError(f"--push={repository} is public already. Name another, or leave --private out.")
        return str(api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Experts and router"))
    except LocalTokenNotFoundError:
        raise UserError(f"--push={repository} needs a token of the Hub. Run: hf auth login") from None
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--push={repository}: the Hub cannot be written to: {first.rstrip('.')}. Check the name, the network and the "
            "token (hf auth login); the same command then pushes the folder as it stands."
        ) from error
