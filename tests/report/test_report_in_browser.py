"""The page in headless Chromium: nothing to complain about, every chart drawn, fits a phone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from record_cases import models_record, onnx_record, perplexity_record

from gblm.report.page import html
from gblm.report.sources import read_sources

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
# Only in the test's copy: the page itself has no script.
PROBE = """<script>
addEventListener("load", () => {
  const charts = [...document.querySelectorAll("svg")].map(svg => {
    const frame = svg.getBoundingClientRect();
    const marks = [...svg.querySelectorAll(".mark")].map(mark => mark.getBoundingClientRect());
    const texts = [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect());
    const inside = box => box.left >= frame.left - 1 && box.right <= frame.right + 1 &&
      box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1;
    return {label: svg.getAttribute("aria-label"), width: frame.width, marks: marks.length,
      drawn: marks.filter(box => box.width > 0 && box.height > 0 && inside(box)).length,
      outside: [...svg.querySelectorAll("text")].filter((t, i) => !inside(texts[i]))
        .map(t => t.textContent)};
  });
  const images = [...document.querySelectorAll("image")];
  const load = image => new Promise(done => { const copy = new Image();
    copy.onload = () => done(copy.naturalWidth); copy.onerror = () => done(0);
    copy.src = image.href.baseVal; });
  Promise.all(images.map(load)).then(widths => {
    parent.postMessage(JSON.stringify({charts, widths,
      inner: innerWidth, scroll: document.documentElement.scrollWidth}), "*");
  });
});
</script>"""
# Windows are at least 500 wide, frames are not.
FRAME = """<!doctype html><script>
addEventListener("message", event => { document.documentElement.dataset.probe = event.data; });
</script><iframe src="PAGE" width="WIDTH" height="900" style="border: 0"></iframe>"""


class Probe(HTMLParser):
    """Finds what the script left in the document."""

    found: dict[str, Any] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        value = dict(attrs).get("data-probe")
        if tag == "html" and value:
            self.found = json.loads(value)


@pytest.fixture(scope="module")
def page(pack_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with something in every section, names as long as they come."""
    folder = tmp_path_factory.mktemp("page")
    name = "a-model-with-a-very-long-name-" * 4
    records = [
        perplexity_record(name, 27.5),
        perplexity_record("half", 1400.0),
        onnx_record({"smol": 20.0, "half": 10.0, name: 5.0}),
        models_record({"smol": 20.0, "half": 10.0, name: 5.0}, concurrency=(1, 4, 16)),
        models_record({"smol": 20.0, "half": 11.0}),
        models_record({"smol": 20.0, "broken": 1.0}, invalid={"broken": "7 preemptions"}),
    ]
    records[3]["command"] = "gblm bench models " + "x" * 300
    paths = []
    for number, record in enumerate(records):
        paths.append(folder / f"{number}.json")
        paths[-1].write_text(json.dumps(record))
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
    probe = Probe()
    probe.feed(out)
    found = probe.found
    assert found is not None, err
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert len(found["charts"]) > 20
    assert len(found["widths"]) == 14
    assert min(found["widths"]) > 0
    for chart in found["charts"]:
        assert chart["width"] > 300, chart
        assert chart["drawn"] == chart["marks"] > 0, chart
        assert chart["outside"] == [], chart


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
