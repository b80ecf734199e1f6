"""Checkpoints of one training run on any filesystem: written beside the training, whole or not at all, the last two kept.

    checkpoints/experts/cluster=0003/SETTINGS-AND-INPUTS/step=0000001200.pt

Ray Train can keep checkpoints too, but (2.60) it leaves those of killed workers behind, writes its list of them in
place, and takes a full disk for a fault that a restart may cure.
"""

from __future__ import annotations

import io
import pickle
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from cbtm_ray import files
from cbtm_ray.errors import UserError

KEEP = 2


class Checkpoints:
    """The checkpoints in a folder that nobody else writes to, and the thread that writes the next."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def last(self) -> dict[str, Any] | None:
        """The newest state, on the CPU; None without one.

        Raises:
            UserError: it is damaged.
        """
        found = files.list_files(self.uri)
        if not found:
            return None
        try:
            return torch.load(io.BytesIO(files.read_bytes(found[-1])), weights_only=True, map_location="cpu")
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{found[-1]} is damaged. Delete it, and training goes on from the one before.") from error

    def save(self, state: dict[str, Any]) -> None:
        """Take the state as it is now, and write it in the background. Waits for the one before.

        Raises:
            OSError: the one before could not be written.
        """
        content = io.BytesIO()
        torch.save(state, content)
        self._wait()
        self._writing = self._writer.submit(self._write, state["step"], content)

    def close(self) -> None:
        """Wait for what is being written; errors as in `save`."""
        self._writer.shutdown()
        self._wait()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write(self, step: int, content: io.BytesIO) -> None:
        files.delete_unfinished(self.uri)
        files.write_bytes(files.join(self.uri, f"step={step:010d}.pt"), content.getbuffer())
        for old in files.list_files(self.uri)[:-KEEP]:
            files.delete(old)
