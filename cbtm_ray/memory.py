"""What to say when Ray's memory monitor ended processes of a job because a node's memory was used up."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator


def out_of_memory(error: BaseException) -> str | None:
    """One line, if the exception came of processes that Ray ended for want of memory: which, why, and how to go on."""
    import ray

    for cause in _causes(error):
        if isinstance(cause, ray.exceptions.OutOfMemoryError):
            return _describe(str(cause))
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and all that it came of: Python's causes, those of Ray's tasks, and those of Ray Train's workers."""
    waiting, seen = [error], set[int]()
    while waiting:
        here = waiting.pop(0)
        if id(here) in seen:
            continue
        seen.add(id(here))
        yield here
        failures = getattr(here, "worker_failures", {}).values()
        names = ("cause", "controller_failure", "__cause__", "__context__")
        found = [*failures, *(getattr(here, name, None) for name in names)]
        waiting += [cause for cause in found if isinstance(cause, BaseException)]


def _describe(said: str) -> str:
    """The line, from Ray's page: its sentence on memory, the tasks selected to be killed, and the largest user."""
    killed = Counter(name.partition(".")[0].rpartition(":")[2] for name in re.findall(r"task name=([^,]+),", said))
    each = ", ".join(f"{name} x {count}" if count > 1 else name for name, count in killed.most_common())
    names = f" ({each})" if each else ""
    used = re.search(r"\(IP: ([^,]+), .*?was (\S+) used / (\S+) limit", said)
    on = f" on node {used[1]}: {used[2]} of {used[3]} were used" if used else ""
    top = re.search(r"^(\d+)\t([\d.]+)\t(.+)$", said, re.MULTILINE)
    most = f", most by process {top[1]} ({top[2]} GB, {top[3][:100]})" if top else ""
    return (
        f"Ray's memory monitor ended processes of this job{names} because memory ran short{on}{most}. What is finished is "
        "kept. End what takes the memory, or run fewer trainings at once (train.slots=1); the same command then continues. "
        "RAY_memory_usage_threshold=0.98 in the environment lets more be used."
    )
