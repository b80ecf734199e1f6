"""A training curve as TensorBoard's event file: `tensorboard --logdir RUN_DIR/tensorboard` shows all models of a run.

The writer is tensorboardX, which Ray Train brings; the viewer is the package tensorboard, which a user may install.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from cbtm_ray import files

FIELDS = ("loss_nats", "valid_loss_nats", "learning_rate", "tokens_per_s", "mfu")


def write_events(curve: Sequence[Mapping[str, Any]], folder_uri: str) -> None:
    """Write the whole curve by step, over what was written of it before. Time is that of training, from 0."""
    seconds, tokens = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for point in curve:
                seconds += (point["tokens"] - tokens) / point["tokens_per_s"]
                tokens = point["tokens"]
                for name in FIELDS:
                    if point.get(name) is not None:
                        writer.add_scalar(name, point[name], point["step"], walltime=seconds)
        (written,) = Path(folder).iterdir()
        files.write_bytes(files.join(folder_uri, "events.out.tfevents.0"), written.read_bytes())
