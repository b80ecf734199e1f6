"""Experts of which only some have their weights in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedModel

from cbtm_ray.models import load_model


class PagedExperts(Mapping[int, PreTrainedModel]):
    """Experts by cluster, loaded when they are asked for; the one that nobody asked for longest gives way.

    For several threads: one that still holds a model which has given way keeps it in memory until it lets go.
    """

    def __init__(self, folders: dict[int, str], resident: int, device: str = "cpu") -> None:
        """
        Args:
            folders: of every expert, path or URI.
            resident: experts that have their weights in memory at a time; so many are loaded at once.
            device: where that memory is.
        """
        self._folders, self.resident, self._device = folders, resident, device
        self._loaded: OrderedDict[int, PreTrainedModel] = OrderedDict()
        self._lock = threading.Lock()
        for cluster in list(folders)[:resident]:
            self[cluster]

    @property
    def loaded(self) -> list[int]:
        """Experts in memory, least recently used first."""
        return list(self._loaded)

    def __getitem__(self, cluster: int) -> PreTrainedModel:
        with self._lock:
            if cluster not in self._loaded:
                folder = self._folders[cluster]
                while len(self._loaded) >= self.resident:
                    self._loaded.popitem(last=False)
                self._loaded[cluster] = torch.nn.Module.to(load_model(folder).eval(), self._device)
            self._loaded.move_to_end(cluster)
            return self._loaded[cluster]

    def __contains__(self, cluster: object) -> bool:
        return cluster in self._folders

    def __iter__(self) -> Iterator[int]:
        return iter(self._folders)

    def __len__(self) -> int:
        return len(self._folders)
