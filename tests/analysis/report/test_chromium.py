"""The page in Chromium: on a desktop and a phone, light and dark, in print, and without scripts. Screenshots: build/report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fedsim_analysis.report import assembly, page
from reported_runs import three_jobs, write

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
SHOTS = Path(__file__).parents[3] / "build" / "report"
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
PICTURE = b'<svg xmlns="http://www.w3.org/2000/svg" width="240" height="160"><rect width="240" height="160" fill="#0072B2"/></svg>'

pytestmark = [pytest.mark.processes, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [*three_jobs(folder), write(folder / "late.h5", "adp", done=1, finished=False)]
    return made(runs, folder / "report.html")


def made(runs: list[Path], out: Path) -> Path:
    report = assembly.report(runs, "report_figures", datetime(2026, 11, 28, tzinfo=UTC)).report
    out.write_text(page.render(report, {figure.name: PICTURE for figure in report.figures()}))
    return out


class Seen:
    """A page that was opened, and what its console said and what it asked the network for."""

    def __init__(self, browser: Any, path: Path, **view: Any) -> None:
        self.context = browser.new_context(**view)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.faults.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        if view.get("java_script_enabled", True):
            self.page.wait_for_selector("html[data-drawn=all]", state="attached")

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)

    def settle(self) -> None:
        """Until all changes of the charts are done."""
        self.ask("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.ask("Promise.all(Array.from(document.querySelectorAll('.chart')).map((chart) => chart.work)).then(() => true)")

    def until(self, holds: Callable[[], bool]) -> None:
        """Waits until it holds: the page hears of another theme some moments later."""
        for _ in range(100):
            if holds():
                return
            self.page.wait_for_timeout(100)
        pytest.fail("the page has not changed")

    def boxes(self, selector: str) -> list[dict[str, float]]:
        return self.ask(f"Array.from(document.querySelectorAll({selector!r})).map((e) => e.getBoundingClientRect().toJSON())")

    def shoot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(SHOTS / f"{name}.png"), full_page=True)


@pytest.fixture(scope="module")
def desktop(browser: Any, report: Path) -> Iterator[Seen]:
    with Seen(browser, report, **DESKTOP) as seen:
        yield seen


@pytest.fixture(scope="module")
def phone(browser: Any, report: Path) -> Iterator[Seen]:
    with Seen(browser, report, **PHONE) as seen:
        yield seen


@pytest.fixture(params=["desktop", "phone"])
def seen(request: pytest.FixtureRequest) -> Seen:
    found: Seen = request.getfixturevalue(request.param)
    return found


def test_every_figure_is_visible_and_nothing_is_beside_the_screen(seen: Seen, report: Path) -> None:
    width = seen.page.viewport_size["width"]
    seen.shoot("desktop" if width > 1000 else "phone")
    assert seen.faults == []
    assert [url for url in seen.requests if not url.startswith(("data:", "blob:"))] == [report.as_uri()]
    assert seen.ask("document.documentElement.scrollWidth") <= width
    drawn = seen.boxes("figure .chart .main-svg:first-child")
    assert len(drawn) == seen.ask("document.querySelectorAll('figure').length") >= 19
    assert all(box["left"] >= 0 and box["right"] <= width and box["height"] >= 200 and box["width"] >= 250 for box in drawn)
    assert all(seen.ask("Array.from(document.querySelectorAll('.chart')).map((c) => c.querySelectorAll('path, image').length > 4)"))
    assert {box["width"] for box in seen.boxes(".picture")} == {0}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_its_ground_in_both_themes(seen: Seen, theme: Any) -> None:
    """WCAG asks for a ratio of 4.5. The theme is followed while the page is open."""
    seen.page.emulate_media(color_scheme=theme)
    ink = seen.ask("getComputedStyle(document.body).color")
    sync_api.expect(seen.page.locator("#accuracy_over_round .xtick text").first).to_have_css("fill", ink)
    assert (luminance(ink) > 0.5) == (theme == "dark")
    if theme == "dark":
        seen.shoot("desktop-dark" if seen.page.viewport_size["width"] > 1000 else "phone-dark")
    for selector, ground in (("h1", "body"), (".subtitle", "body"), ("nav a", "body"), ("header .warns", "header .warns")):
        assert contrast(seen, selector, ground) >= 4.5, selector
    for selector in ("figcaption", ".made", "thead th", "td", ".notes", ".cards .label", "summary"):
        assert contrast(seen, selector, ".box") >= 4.5, selector
    assert seen.faults == []
    seen.page.emulate_media(color_scheme="light")


def test_curves_stand_out_from_dark_ground(seen: Seen) -> None:
    """Also of the darkest shade of a method; the same curve has its own colour again on light ground."""
    styles = "Array.from(document.querySelectorAll('.js-line, .dot')).map((one) => getComputedStyle(one))"
    ask = f"{styles}.map((style) => style.stroke === 'none' ? style.backgroundColor : style.stroke)"
    light = seen.ask(ask)
    seen.page.emulate_media(color_scheme="dark")
    seen.until(lambda: seen.ask(ask) != light)
    seen.settle()
    ground = seen.ask("getComputedStyle(document.querySelector('.box')).backgroundColor")
    assert min(ratio(colour, ground) for colour in seen.ask(ask)) >= 3
    seen.page.emulate_media(color_scheme="light")
    seen.until(lambda: seen.ask(ask) == light)


def test_titles_of_axes_are_not_cut_and_the_tools_are_not_over_the_legend(seen: Seen) -> None:
    charts, titles = (seen.boxes(f".chart{inner}") for inner in (":has(.xtitle)", " .xtitle"))
    assert len(charts) == len(titles) > 10
    assert all(chart["left"] <= title["left"] and title["right"] <= chart["right"] for chart, title in zip(charts, titles, strict=True))
    tools, plots = seen.boxes(".chart .modebar"), seen.boxes(".chart:has(.modebar) .main-svg:first-child")
    assert all(tool["bottom"] <= plot["top"] for tool, plot in zip(tools, plots, strict=True))


def contrast(seen: Seen, selector: str, ground: str) -> float:
    ink = seen.ask(f"getComputedStyle(document.querySelector({selector!r})).color")
    return ratio(ink, seen.ask(f"getComputedStyle(document.querySelector({ground!r})).backgroundColor"))


def ratio(one: str, other: str) -> float:
    light = sorted(map(luminance, (one, other)))
    return (light[1] + 0.05) / (light[0] + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_in_print_the_pictures_stand_on_white_paper(desktop: Seen) -> None:
    desktop.page.emulate_media(media="print", color_scheme="dark")
    assert {box["width"] for box in desktop.boxes(".chart, .switches, nav")} == {0}
    assert all(box["width"] >= 200 for box in desktop.boxes(".picture"))
    assert desktop.ask("Array.from(document.images).every((image) => image.naturalWidth > 0)")
    assert desktop.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert contrast(desktop, "figcaption", "figure") >= 4.5
    desktop.page.emulate_media(media="screen", color_scheme="light")
    SHOTS.mkdir(parents=True, exist_ok=True)
    desktop.page.pdf(path=str(SHOTS / "print.pdf"), format="A4")
    assert (SHOTS / "print.pdf").read_bytes().startswith(b"%PDF")
    desktop.settle()
    drawn, chart = (desktop.boxes(f"#accuracy_over_round {part}")[0]["width"] for part in (".main-svg", ".chart"))
    assert abs(drawn - chart) < 1


def test_without_scripts_the_pictures_are_there(browser: Any, report: Path) -> None:
    with Seen(browser, report, java_script_enabled=False, **PHONE) as seen:
        seen.shoot("phone-without-scripts")
        pictures = seen.page.locator(".picture")
        assert pictures.count() >= 19
        assert all((box := picture.bounding_box()) and box["width"] >= 200 for picture in pictures.all())
        assert seen.page.locator(".chart").first.is_hidden()


def test_curves_are_switched_on_and_off_in_all_figures(desktop: Seen) -> None:
    visible = """Object.fromEntries(Array.from(document.querySelectorAll('.chart')).map((place) => [place.dataset.chart,
        place.data.filter((trace) => trace.legendgroup && trace.visible !== 'legendonly').map((trace) => trace.legendgroup)]))"""
    before = desktop.ask(visible)
    assert set(before["accuracy_over_round"]) == {"fedavg", "fedtiny", "fedmef", "adp"}
    desktop.page.get_by_role("checkbox", name="fedavg").uncheck()
    desktop.settle()
    assert not [name for name, groups in desktop.ask(visible).items() if "fedavg" in groups]
    desktop.page.get_by_role("checkbox", name="fedavg").check()
    desktop.settle()
    assert desktop.ask(visible) == before
    assert desktop.faults == []


def test_the_pointer_shows_the_numbers_of_a_point(desktop: Seen) -> None:
    chart = desktop.page.locator("#accuracy_over_round .chart")
    desktop.settle()
    chart.scroll_into_view_if_needed()
    box = chart.locator(".nsewdrag").first.bounding_box()
    desktop.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    desktop.page.mouse.move(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
    hover = chart.locator(".hoverlayer")
    sync_api.expect(hover).to_contain_text("fedtiny: 79 % (66.29 to 91.71)")  # 80 and 78 %, and 12.71 times their deviation over sqrt(2)
    sync_api.expect(hover).to_contain_text("fedavg: 89 %")


EVIL = '</script><script>document.title="hacked"</script><img src=x onerror="document.title=\'hacked\'">'


def test_markup_and_escapes_of_a_run_file_are_shown(browser: Any, tmp_path: Path) -> None:
    escape = "\x1b[31m"
    folder = tmp_path / "runs"
    folder.mkdir()
    job = f"evil = '''{EVIL}'''"
    runs = [
        write(folder / f"{escape}<i>a.h5", "<b>x</b>%{y}<!--", extra=job, layer="<u>fc<script>", hosts=EVIL, torch_version="<s>1"),
        write(folder / "b.h5", "fedavg", hosts="node&amp;", layer="<u>fc<script>"),
    ]
    with Seen(browser, made(runs, tmp_path / "report.html"), **DESKTOP) as seen:
        seen.shoot("hostile")
        assert seen.faults == []
        assert seen.page.title() != "hacked"
        assert "<b>x</b>%{y}<!--" in seen.page.inner_text("h1")
        text = seen.ask("document.body.textContent")
        for shown in (EVIL, "\\x1b[31m<i>a", "node&amp;", "<s>1"):
            assert shown in text
        assert "<u>fc<script>" in seen.page.locator("#layer_density_1 .ytick").all_text_contents()
        assert "<b>x</b>%{y}<!--" in seen.page.locator("#accuracy_over_round .legendtext").all_text_contents()
        assert "\x1b" not in seen.page.content()
        assert seen.ask("document.querySelectorAll('main b, main i, main u, main s, main img:not(.picture)').length") == 0
