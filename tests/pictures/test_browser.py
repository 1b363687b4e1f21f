"""Pages opened in headless Chromium: they draw, move, stay silent and ask the network for nothing.

Screenshots go to build/pages (or where MECHCAUSAL_SCREENSHOTS says), for a person to look at.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechcausal.pictures.pages import write_comparison, write_report
from mechcausal.pictures.pages.run_page import _FILM
from mechcausal.records.run_data import RunData
from tests.run_folders import heads_recipe, recipe_of, run_of, two_parents_recipe, write_run

webdriver = pytest.importorskip("selenium.webdriver")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None or DRIVER is None,
        reason="no Chromium with its chromedriver: .ci/browser installs them",
    ),
]
WIDTHS = (390, 820, 1400)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size=1400,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def chain_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a chain's run of four steps."""
    return write_report(write_run(tmp_path_factory.mktemp("chain") / "run", run_of()))


@pytest.fixture(scope="module")
def screenshots(repository: Path) -> Path:
    folder = Path(os.environ.get("MECHCAUSAL_SCREENSHOTS", repository / "build" / "pages"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"screenshots: {folder}")
    return folder


def wait(browser: Any, condition: str) -> None:
    holds = browser.execute_async_script(
        "const done = arguments[0], start = Date.now();"
        f"(function look() {{ if ({condition}) done(true);"
        "else if (Date.now() - start > 50000) done(false); else setTimeout(look, 20); })()"
    )
    assert holds, condition


def open_page(browser: Any, path: Path) -> None:
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.resolve().as_uri())
    wait(browser, "document.documentElement.dataset.ready === 'yes'")


def check_silence(browser: Any) -> None:
    """No error or warning on the console, and no request but for the page itself."""
    assert not [
        entry["message"] for entry in browser.get_log("browser") if entry["level"] != "INFO"
    ]
    requests = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            requests.append(message["params"]["request"]["url"])
    assert not [url for url in requests[1:] if not url.startswith(("data:", "blob:"))]


def move_to(browser: Any, frame: int) -> None:
    """As a person would: the slider, and what it sets off."""
    browser.execute_script(
        "const slider = document.getElementById('step'); slider.value = arguments[0];"
        "slider.dispatchEvent(new Event('input', { bubbles: true }));",
        frame,
    )
    wait(browser, f"document.documentElement.dataset.step == steps[{frame}] && !busy")


def drawn(browser: Any, panel: str) -> list[list[dict[str, Any]]]:
    """The traces of every picture in a panel, as they are drawn."""
    text = browser.execute_script(
        "return JSON.stringify([...document.querySelectorAll("
        f"'[data-panel=\"{panel}\"] .plot')].map((plot) => plot._fullData.map((trace) => ({{"
        "x: trace.x && Array.from(trace.x), y: trace.y && Array.from(trace.y), "
        "z: trace.z && Array.from(trace.z, (row) => Array.from(row)), zmax: trace.zmax, "
        "symbol: trace.marker?.symbol, custom: trace.customdata }))))"
    )
    traces: list[list[dict[str, Any]]] = json.loads(text)
    return traces


def shoot(browser: Any, screenshots: Path, name: str, dark: bool = False) -> None:
    theme = "dark" if dark else "light"
    for width in WIDTHS:
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_async_script(f"applyTheme('{theme}').then(arguments[0])")
        browser.execute_async_script("setTimeout(arguments[0], 400)")
        height, wide = browser.execute_script(
            "return [document.documentElement.scrollHeight, document.documentElement.scrollWidth]"
        )
        assert wide <= width, "the page must not be wider than the screen"
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"height": height})
        browser.execute_async_script("setTimeout(arguments[0], 400)")
        browser.save_screenshot(str(screenshots / f"{name}-{width}.png"))
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize(
    ("name", "recipe", "dark"),
    [("chain", recipe_of(), False), ("two-parents", two_parents_recipe(12), True)],
)
def test_the_slider_moves_every_picture_to_what_python_draws(
    name: str, recipe: Any, dark: bool, browser: Any, screenshots: Path, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", run_of(recipe))
    open_page(browser, write_report(folder))
    run = RunData.load(folder)
    before = drawn(browser, "attention")
    words = browser.find_element("css selector", '[data-panel="attention"] figcaption').text
    move_to(browser, 1)
    step = run.steps[1]
    assert drawn(browser, "attention") != before
    assert browser.find_element("css selector", '[data-panel="attention"] figcaption').text != words
    for panel in ("attention", "graph", "gradient", "scatter", "examples"):
        figures = _FILM[panel][2](run, step)
        for figure, traces in zip(figures, drawn(browser, panel), strict=True):
            assert len(traces) == len(figure.data), panel
            for expected, actual in zip(figure.data, traces, strict=True):
                for axis in ("x", "y", "z"):
                    compare(getattr(expected, axis, None), actual.get(axis))
                if expected.type == "heatmap":
                    assert actual["zmax"] == pytest.approx(expected.zmax, rel=1e-3)
                if panel == "graph" and isinstance(expected.marker.symbol, tuple):
                    assert tuple(actual["symbol"]) == expected.marker.symbol
    cursors = browser.execute_script(
        "return plots.flatMap((p) => (p.layout.shapes ?? []).filter((s) => s.name === 'cursor')"
        ".map((s) => s.x0))"
    )
    assert cursors
    assert set(cursors) == {step}
    shoot(browser, screenshots, name, dark)
    check_silence(browser)


def compare(expected: Any, actual: Any) -> None:
    """Equal to the rounding of the page; gaps on both sides count as equal."""
    left, right = flat(expected), flat(actual)
    if not np.isfinite(left).any() and right.size == 0:
        return  # Plotly forgets the points of a trace that shows none
    assert left.shape == right.shape
    spread = np.ptp(left[np.isfinite(left)]) if np.isfinite(left).any() else 0.0
    np.testing.assert_allclose(right, left, atol=1e-4 * spread, rtol=1e-5)


def flat(values: Any) -> np.ndarray:
    if values is None:
        return np.zeros(0)
    rows = [np.ravel(np.asarray(row, dtype=object)) for row in values]
    numbers = [np.nan if value is None else value for row in rows for value in row]
    return np.array(numbers, dtype=float)


def test_play_runs_to_the_end_and_keys_move(browser: Any, chain_page: Path) -> None:
    open_page(browser, chain_page)
    play = browser.find_element("id", "play")
    play.click()  # from the last step it starts again
    wait(browser, "steps[current] === 27")
    wait(browser, "timer === null && current === steps.length - 1")
    assert "Play" in play.text
    body = browser.find_element("css selector", "body")
    browser.execute_script("document.activeElement.blur()")
    body.send_keys("\ue012")  # arrow left
    wait(browser, "current === 2 && !busy")
    slider = browser.find_element("id", "step")
    slider.send_keys("\ue012")
    wait(browser, "current === 1 && !busy")
    assert slider.get_attribute("aria-valuetext") == "step 13, stage 1"
    browser.execute_script("document.activeElement.blur()")
    body.send_keys(" ")
    wait(browser, "timer !== null")
    body.send_keys(" ")
    wait(browser, "timer === null")
    check_silence(browser)


@pytest.mark.parametrize("recipe", [None, heads_recipe()])
def test_every_picture_has_a_text_alternative_of_its_step(
    recipe: Any, browser: Any, chain_page: Path, tmp_path: Path
) -> None:
    heads = recipe and write_report(write_run(tmp_path / "run", run_of(recipe)))
    open_page(browser, heads or chain_page)
    plots = browser.find_elements("css selector", ".plot")
    first = [plot.get_attribute("aria-label") for plot in plots]
    assert all(plot.get_attribute("role") == "img" for plot in plots)
    assert all(len(label) > 30 for label in first)
    move_to(browser, 0)
    second = [plot.get_attribute("aria-label") for plot in plots]
    assert all(a != b for a, b in zip(first, second, strict=True))
    buttons = browser.find_elements("css selector", "button, input")
    assert all(
        b.text
        or b.get_attribute("aria-label")
        or browser.execute_script("return arguments[0].labels.length", b)
        for b in buttons
    )
    check_silence(browser)


def test_light_and_dark_by_preference_and_by_button(browser: Any, chain_page: Path) -> None:
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    open_page(browser, chain_page)
    ink = "return [document.documentElement.dataset.theme, plots[0]._fullLayout.font.color]"
    theme, colour = browser.execute_script(ink)
    assert theme == "dark"
    browser.find_element("id", "theme").click()
    wait(browser, "document.documentElement.dataset.theme === 'light'")
    wait(browser, f"plots[0]._fullLayout.font.color !== '{colour}'")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    check_silence(browser)


def test_paper_gets_its_own_width_and_light_colours(browser: Any, chain_page: Path) -> None:
    open_page(browser, chain_page)
    browser.execute_async_script("applyTheme('dark').then(arguments[0])")
    widths = (
        "return [...document.querySelectorAll('.main-svg')].map((svg) => svg.clientWidth)"
        ".filter((width) => width > 0)"
    )
    before = browser.execute_script(widths)
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert max(browser.execute_script(widths)) <= 700
    assert browser.execute_script("return document.documentElement.dataset.theme") == "light"
    browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script(widths) == before
    check_silence(browser)


def test_the_comparison_sorts_and_filters(browser: Any, screenshots: Path, tmp_path: Path) -> None:
    runs = [run_of(recipe_of(seed=seed), name=f"seed{seed}") for seed in range(3)]
    runs += [
        run_of(recipe_of(task__alpha=0.5, seed=seed), name=f"smooth{seed}") for seed in (11, 12)
    ]
    open_page(browser, write_comparison(runs, tmp_path / "all.html"))

    def names() -> list[str]:
        cells = browser.find_elements("css selector", "#summaries tbody tr td:first-child")
        return [cell.text for cell in cells if cell.is_displayed()]

    assert names() == [run.name for run in runs]
    seed = browser.find_elements("css selector", "#summaries th button")[2]
    seed.click()
    seed.click()
    assert names() == ["smooth12", "smooth11", "seed2", "seed1", "seed0"]
    assert seed.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    browser.find_element("id", "filter").send_keys("0.5 smooth")
    assert names() == ["smooth12", "smooth11"]
    assert browser.find_element("id", "count").text == "2 of 5 runs"
    browser.execute_script("filter.value = ''; apply()")
    shoot(browser, screenshots, "comparison")
    check_silence(browser)


def test_a_long_run_opens(browser: Any, tmp_path: Path) -> None:
    recipe = recipe_of(graph__sequence_length=200, training__stage1__steps=1000)
    run = run_of(recipe, n_frames=8)
    open_page(browser, write_report(write_run(tmp_path / "run", run)))
    move_to(browser, 3)
    assert len(drawn(browser, "attention")[0][0]["z"]) == 200
    check_silence(browser)


def test_markup_in_strings_shows_as_text(browser: Any, tmp_path: Path) -> None:
    markup = "<img src=x onerror=document.title='caught'>"
    recipe = recipe_of(wandb__tags=[markup], wandb__project=f"</script>{markup}")
    other = run_of(recipe_of(task__alpha=0.5), name=markup)
    write_run(tmp_path / "run", run_of(recipe))
    for path in (
        write_report(tmp_path / "run"),
        write_comparison([RunData.load(tmp_path / "run"), other], tmp_path / "all.html"),
    ):
        open_page(browser, path)
        assert browser.title != "caught"
        assert markup in browser.find_element("css selector", "body").text
        assert not browser.find_elements("css selector", "img")
        check_silence(browser)
