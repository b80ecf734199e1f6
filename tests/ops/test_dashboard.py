"""The Grafana dashboard asks for metrics that this Ray has, by the names that it gives them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ray

ROOT = Path(__file__).parents[2]


def test_every_metric_of_the_dashboard_is_one_of_ray_s() -> None:
    dashboard = json.loads((ROOT / "ops" / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\bray_\w+", target["expr"])
    }
    modules = Path(ray.__file__).parent / "dashboard" / "modules"
    of_nodes = re.findall(
        r'^    "(\w+)": Gauge', (modules / "reporter" / "reporter_agent.py").read_text(), re.MULTILINE
    )
    panels = (modules / "metrics" / "dashboards" / "default_dashboard_panels.py").read_text()
    known = {f"ray_{name}" for name in of_nodes} | set(re.findall(r"\bray_\w+", panels))
    assert len(asked) > 10
    assert asked <= known


def test_no_two_panels_share_a_place_or_a_number() -> None:
    panels = json.loads((ROOT / "ops" / "grafana.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
