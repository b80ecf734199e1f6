"""The report page in a real browser: no sideways scrolling at desktop and phone width, in light and in dark."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from cbtm_ray.report.page import render_report
from tests.support.browser import CHROMIUM
from tests.support.report_data import make_data

LIGHT, DARK = 1, 0

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium (apt-get install chromium)"),
]

MEASURE = """
<body style="margin: 0"><iframe style="border: 0; width: {width}px; height: {height}px" src="report.html"></iframe>
<pre id="measured"></pre>
<script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  if ({open_details}) page.querySelectorAll("details").forEach(details => details.open = true);
  const root = page.documentElement;
  const free = [...page.querySelectorAll("body *")].filter(element => !element.closest(".scroll > *, svg *"));
  const outside = free.filter(element => element.getBoundingClientRect().right > root.clientWidth + 0.5);
  const svgs = [...page.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().width);
  const small = [...page.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height);
  document.querySelector("#measured").textContent = JSON.stringify({{
    scroll_width: root.scrollWidth, client_width: root.clientWidth, svgs, text_height: Math.min(...small),
    outside: outside.map(element => element.outerHTML.slice(0, 120))}});
}};
</script>
"""


def run_chromium(folder: Path, page: Path, *options: str) -> str:
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--allow-file-access-from-files", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    path.joinpath("report.html").write_text(render_report(make_data()), encoding="utf-8")
    return path


@pytest.mark.parametrize("open_details", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_does_not_scroll_sideways(folder: Path, width: int, open_details: bool) -> None:
    """Measured in a frame, since a window cannot be as narrow as a phone."""
    wrapper = folder / "measure.html"
    wrapper.write_text(MEASURE.format(width=width, height=900, open_details=json.dumps(open_details)), encoding="utf-8")
    dom = run_chromium(folder, wrapper, "--dump-dom", "--window-size=1400,1000")
    found = re.search(r'<pre id="measured">(.+?)</pre>', dom, re.DOTALL)
    assert found, "the page was not measured"
    measured = json.loads(html.unescape(found[1]))
    assert measured["client_width"] == width
    assert measured["outside"] == []
    assert measured["scroll_width"] <= width
    assert 0 < max(measured["svgs"]) <= width
    assert measured["text_height"] >= 9


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
@pytest.mark.parametrize("width", [1280, 390])
def test_screenshot_follows_the_color_scheme(folder: Path, width: int, scheme: int) -> None:
    wrapper, picture = folder / "look.html", folder / f"report-{width}-{scheme}.png"
    wrapper.write_text(MEASURE.format(width=width, height=3000, open_details="false"), encoding="utf-8")
    options = (f"--screenshot={picture}", f"--window-size={max(width, 600)},3000")
    run_chromium(folder, wrapper, f"--blink-settings=preferredColorScheme={scheme}", *options)
    grey = np.asarray(image.imread(picture))[:2900, :width, :3].mean(axis=2)
    paper = float(np.median(grey))
    assert paper > 0.9 if scheme == LIGHT else paper < 0.2
    assert np.mean(np.abs(grey - paper) > 0.4) > 0.01, "the page has no ink"
