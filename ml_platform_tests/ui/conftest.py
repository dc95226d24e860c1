"""A browser, and what it looks at: what `make dev` shows of files that were processed, scored and graded."""

from __future__ import annotations

import io
import json
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from ml_platform.dev.cloud.processes import free_port, listens
from ml_platform.dev.simulator import Simulation
from ml_platform_tests.images.session import NO_CODEGEN
from ml_platform_tests.world import ML_PLATFORM, PROJECT, RawFile, World, no_process_left, simulated, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

#: Playwright's own browsers are downloads, which not every network allows.
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "google-chrome-stable"))), None)

#: Long enough for a machine that is busy with other tests.
TIMEOUT_S = 180

#: No test opens it.
DOCS_URL = "https://git.example/team/ml_platform/docs"

# The ports of `make dev`, for pictures that show them.
DAGSTER_PORT, MLFLOW_PORT = 3000, 5000

#: Enough days for a champion of three files whose drift checks are calibrated, and for four graded weeks of the last.
SIMULATION = Simulation(days_per_file=35, customers=500, terminals=2500, fault_rate=200)
*HISTORY, SCORED, NEW = (simulated(index, SIMULATION) for index in range(5))
#: Lines of the new file, which a test has cleaned: that it is small saves time.
NEW_LINES = 3_000


@dataclass(frozen=True)
class Ui:
    """The addresses of the running UIs, and the world that they show."""

    dagster: str
    mlflow: str
    world: World


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", type=Path, metavar="DIRECTORY", help="save pictures of the pages there")


@pytest.fixture(scope="session")
def screenshot_directory(pytestconfig: pytest.Config) -> Path | None:
    return pytestconfig.getoption("--screenshots", None)


def write_raw(world: World, *files: RawFile, lines: int | None = None) -> None:
    for file in files:
        (world.raw / file.name).write_bytes(b"".join(file.content.splitlines(keepends=True)[:lines]))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, screenshot_directory: Path | None) -> World:
    """Three files with a champion, and a fourth that it scored."""
    ports = (free_port(), free_port()) if screenshot_directory is None else (DAGSTER_PORT, MLFLOW_PORT)
    # Or the tests would look at the pages of another `make dev`.
    assert not (busy := [port for port in ports if listens(port)]), f"ports in use: {busy} (stop make dev)"
    settings = {
        "ML_PLATFORM_RUN_CONFIG": str(Path(__file__).with_name("run_config.yaml")),
        "SPARK_PROPERTIES": json.dumps(NO_CODEGEN),
        "PORT": str(ports[0]),
        "MLFLOW_PORT": str(ports[1]),
        "ML_PLATFORM_DOCS_URL": DOCS_URL,
        "MLFLOW_UI_URL": f"http://127.0.0.1:{ports[1]}",
    }
    world = World(tmp_path_factory.mktemp("ui") / "world", overrides=settings)
    with no_process_left(world):
        write_raw(world, *HISTORY)
        world.run(*ML_PLATFORM, "process-new-files")
        write_raw(world, SCORED)
        world.run(*ML_PLATFORM, "process-new-files")
    return world


@pytest.fixture(scope="session")
def ui(world: World) -> Iterator[Ui]:
    """Both UIs and the daemon, as `make dev` starts them; none reads the `.env` of this clone."""
    for name, target in (("scripts", PROJECT), ("workspace.yaml", PROJECT), (".venv", Path(sys.prefix).parent)):
        (world.root / name).symlink_to(target / name)
    ui = Ui(f"http://127.0.0.1:{world.settings['PORT']}", world.settings["MLFLOW_UI_URL"], world)
    log = world.root / "dev.log"
    with no_process_left(world):
        process = world.start("bash", "scripts/dev.sh", log=log)

        def answers() -> bool:
            assert process.poll() is None, log.read_text(errors="replace")[-10_000:]
            return all(map(_is_ok, (f"{ui.dagster}/server_info", f"{ui.mlflow}/health")))

        try:
            wait_until(answers, "both UIs answer", TIMEOUT_S, pause=0.5)
            yield ui
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)


def _is_ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=1000 * TIMEOUT_S)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page of a browser without history. No page of the test may load anything from another machine."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, locale="en-GB", timezone_id="UTC", reduced_motion="reduce"
    )
    context.set_default_timeout(1000 * TIMEOUT_S)
    hosts: set[str | None] = set()
    context.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    yield context.new_page()
    context.close()
    assert hosts <= {"127.0.0.1", None}  # None: pictures that are part of the page


@pytest.fixture
def save(screenshot_directory: Path | None) -> Callable[[str, Page | Locator], None]:
    """Save a picture of a page, or of what the window shows of a part of it, if pictures are wanted."""

    def save_picture(name: str, shown: Page | Locator) -> None:
        from PIL import Image
        from playwright.sync_api import Page

        if screenshot_directory is None:
            return
        screenshot_directory.mkdir(parents=True, exist_ok=True)
        page, clip = (shown, None) if isinstance(shown, Page) else (shown.page, shown.bounding_box())
        if clip is not None:
            clip["height"] = min(clip["height"], page.evaluate("innerHeight") - clip["y"])
        png = Image.open(io.BytesIO(page.screenshot(animations="disabled", clip=clip))).convert("RGB")
        png.quantize(128, dither=Image.Dither.NONE).save(screenshot_directory / f"{name}.png", optimize=True)

    return save_picture
