"""The page in headless Chromium: nothing to complain about, every chart drawn, fits a phone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
from record_cases import quality_record, speed_record

from gblm.report.page import html
from gblm.report.sources import read_sources

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium: .ci/run installs it")
# Only in the test's copy: the page itself has no script.
PROBE = """<script>
addEventListener("load", () => {
  const charts = [...document.querySelectorAll("svg")].map(svg => ({
    width: svg.getBoundingClientRect().width,
    parts: svg.querySelectorAll("path, use, image").length,
  }));
  const load = image => new Promise(done => { const copy = new Image();
    copy.onload = () => done(copy.naturalWidth); copy.onerror = () => done(0);
    copy.src = image.href.baseVal; });
  Promise.all([...document.querySelectorAll("image")].map(load)).then(widths => {
    parent.postMessage(JSON.stringify({charts, widths,
      inner: innerWidth, scroll: document.documentElement.scrollWidth}), "*");
  });
});
</script>"""
# Windows are at least 500 wide, frames are not.
FRAME = """<!doctype html><script>
addEventListener("message", event => { document.documentElement.dataset.probe = event.data; });
</script><iframe src="PAGE" width="WIDTH" height="900" style="border: 0"></iframe>"""


@pytest.fixture(scope="module")
def page(pack_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with something in every section, names as long as they come."""
    folder = tmp_path_factory.mktemp("page")
    name = "a-model-with-a-very-long-name-" * 4
    records = [
        quality_record({name: 27.5, "half": 1400.0, "smol": 13.75}, command="gblm " + "x" * 300),
        speed_record({"smol": 20.0, "half": 10.0, name: 5.0}, loads=("1", name, "16", "64")),
        speed_record({"smol": 20.0, "broken": 1.0}, reason="7 preemptions"),
    ]
    paths = [folder / f"{number}.json" for number in range(len(records))]
    for path, record in zip(paths, records, strict=True):
        record.write(path)
    sources = read_sources([*paths, pack_tiny(pattern="0.5")], [0, 1])
    path = folder / "page.html"
    path.write_text(html(sources, "Test"), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_to_complain_about_every_chart_drawn_and_no_sideways_scrolling(
    page: Path, width: int, tmp_path: Path
) -> None:
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    framed = tmp_path / "framed.html"
    framed.write_text(FRAME.replace("PAGE", probed.name).replace("WIDTH", str(width)))
    out, err = chromium(
        tmp_path, "--dump-dom", "--window-size=1400,1000", "--virtual-time-budget=10000",
        framed.as_uri(),
    )  # fmt: skip
    assert "CONSOLE" not in err, err
    told = re.search(r'<html[^>]* data-probe="([^"]*)"', out)
    assert told is not None, err
    found = json.loads(unescape(told[1]))
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert len(found["charts"]) > 20
    assert len(found["widths"]) >= 15
    assert min(found["widths"]) > 0
    for chart in found["charts"]:
        assert chart["width"] > 300, chart
        assert chart["parts"] > 10, chart


def test_it_prints_on_paper_with_every_section(page: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.pdf"
    _, err = chromium(tmp_path, f"--print-to-pdf={target}", "--no-pdf-header-footer", page.as_uri())
    assert target.read_bytes()[:5] == b"%PDF-", err
    pages = len(re.findall(rb"/Type\s*/Page\b", target.read_bytes()))
    assert pages > 2


def chromium(folder: Path, *words: str) -> tuple[str, str]:
    """Run it once, with a profile of its own."""
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--enable-logging=stderr", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}",
         *words],
        capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"HOME": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr
