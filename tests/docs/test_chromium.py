"""The site in Chromium, from the disk: it asks no network for anything, fits a phone, and its search finds what it should."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("furo", reason="the extra `docs` is not installed: make docs")
ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
PHONE = {"width": 360, "height": 740}

pytestmark = [pytest.mark.processes, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    cache = ROOT / "build" / "docs-cache"  # of `make docs`, if it was called
    subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "-d", cache, ROOT / "docs", out], check=True, timeout=300)
    return out


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_page(viewport=PHONE)
        browser.close()


def test_every_page_fits_a_phone_and_asks_no_network(site: Path, page: Any) -> None:
    asked: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    wide = []
    paths = [path for path in sorted(site.rglob("*.html")) if path.name not in ("genindex.html", "py-modindex.html", "search.html")]
    assert len(paths) > 25
    for path in paths:
        page.goto(path.as_uri())
        if page.evaluate("document.documentElement.scrollWidth") > PHONE["width"]:
            wide.append(path.name)
    assert wide == []
    assert faults == []
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}


@pytest.mark.parametrize(
    ("words", "found"), [("partition alpha", "Fields of a job"), ("max_client_memory", "The run file"), ("export_module", "Python API")]
)
def test_search_works_without_a_server(site: Path, page: Any, words: str, found: str) -> None:
    page.goto(f"{(site / 'search.html').as_uri()}?q={words.replace(' ', '+')}")
    page.wait_for_selector(f"#search-results li:has-text({found!r})", timeout=20_000)
