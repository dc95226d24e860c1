"""The pages show what a run has made: counts, rejects, checks, curves, alerts, grades, drift, and ways to MLflow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from ml_platform.assets.model import CHECKS as MODEL_CHECKS
from ml_platform.checks import DESCRIPTIONS, SCORE_CHECKS
from ml_platform.version import PLATFORM_VERSION
from ml_platform_tests.ui.conftest import BROWSER, DOCS_URL, HISTORY, NEW, NEW_LINES, SCORED, TIMEOUT_S, Ui, write_raw
from ml_platform_tests.world import ticks, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Locator, LocatorAssertions, Page

    Save = Callable[[str, Page | Locator], None]

pytestmark = [
    pytest.mark.ui,
    pytest.mark.e2e,
    pytest.mark.spark,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(BROWSER is None, reason="neither Chromium nor Chrome is in PATH (see: make test-ui)"),
]

ASSETS = ("raw_transactions", "cleaned_transactions", "transaction_features", "scored_transactions", "fraud_model")
KEYS = [file.key for file in (*HISTORY, SCORED)]


def expect(shown: Locator) -> LocatorAssertions:
    """Playwright's assertions. Tests that are not run in a browser need not wait for its import."""
    from playwright.sync_api import expect

    return expect(shown)


def open_partition(page: Page, ui: Ui, asset: str, key: str) -> None:
    page.goto(f"{ui.dagster}/assets/{asset}?view=partitions&partition={key}")


def row_of(page: Page, text: str) -> Locator:
    """The row with a cell of this text: a metadata entry, or a row of a table in one."""
    return page.get_by_role("row").filter(has=page.get_by_role("cell", name=text, exact=True)).last


def open_dialog(page: Page, name: str) -> Locator:
    """Click on a metadata entry that is shown in a dialog."""
    row_of(page, name).get_by_text("[Show Markdown]").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(name)
    return dialog


def assert_pictures_fit(dialog: Locator) -> None:
    """A dialog has pictures, the browser can decode all of them, and none is wider than the dialog."""
    pictures = dialog.get_by_role("img").and_(dialog.locator("[src^='data:image/png']"))
    expect(pictures.first).to_be_visible()
    widths = pictures.evaluate_all("all => Promise.all(all.map(one => one.decode().then(() => one.naturalWidth)))")
    rooms = pictures.evaluate_all("all => all.map(one => one.parentElement.clientWidth)")
    assert all(0 < width <= room for width, room in zip(widths, rooms, strict=True)), (widths, rooms)


def average_precision(ui: Ui, key: str) -> float:
    """That of the model of a partition, in its held-out week."""
    (report,) = (ui.world.lake / "models" / key).glob("*/_report.json")
    return json.loads(report.read_text())["metrics"]["test_average_precision"]


def beginning(description: str) -> str:
    """The first sentence of a description, or its part before any Markdown."""
    return re.split(r" [(`]|(?<=\.) ", description)[0]


def test_the_graph_shows_the_five_assets_and_their_state(page: Page, ui: Ui, save: Save) -> None:
    # In a narrower window, the graph shows little but names.
    page.set_viewport_size({"width": 1900, "height": 640})
    page.goto(f"{ui.dagster}/asset-groups")
    for asset in ASSETS:
        expect(page.get_by_text(asset, exact=True).first).to_be_visible()
    partitions = page.get_by_role("link", name=f"{len(KEYS)} partitions")
    expect(partitions).to_have_count(len(ASSETS) - 1)  # raw files are observed, not made
    for checks in (DESCRIPTIONS, SCORE_CHECKS, MODEL_CHECKS):
        expect(page.get_by_role("link", name=f"{len(checks)} / {len(checks)} Passed").first).to_be_visible()
    save("asset-graph", page)


def test_a_partition_shows_its_counts_and_rejects(page: Page, ui: Ui, save: Save) -> None:
    page.set_viewport_size({"width": 1280, "height": 1280})
    open_partition(page, ui, "cleaned_transactions", SCORED.key)
    counts = SCORED.truth.counts
    assert counts["rejected_rows"] > counts["malformed_row"] > 0
    for name in ("raw_rows", "clean_rows", "duplicate_rows", "rejected_rows", "malformed_row", "hour_24"):
        expect(page.get_by_role("row", name=f"{name} {counts[name]}").last).to_be_visible()
    save("partition", page)


@pytest.mark.parametrize(
    ("asset", "descriptions", "saved"),
    [("cleaned_transactions", DESCRIPTIONS, "reject_rate"), ("scored_transactions", SCORE_CHECKS, "")],
)
def test_checks_say_what_they_check_and_what_came_out(
    page: Page, ui: Ui, save: Save, asset: str, descriptions: dict[str, str], saved: str
) -> None:
    page.goto(f"{ui.dagster}/assets/{asset}?view=checks")
    for name, description in descriptions.items():
        page.get_by_text(name, exact=True).first.click()
        expect(page.get_by_text(beginning(description))).to_be_visible()
        expect(page.locator(f"[href^='{DOCS_URL}']")).to_be_visible()
        expect(page.get_by_text("Passed", exact=True)).to_be_visible()
        if name == saved:
            save("checks", page)
    page.get_by_text("Execution history").click()
    for key in KEYS:
        expect(row_of(page, key)).to_contain_text("Passed")


@pytest.mark.parametrize("asset", ASSETS)
def test_descriptions_link_the_pages_of_the_documentation(page: Page, ui: Ui, asset: str) -> None:
    page.goto(f"{ui.dagster}/assets/{asset}?view=overview")
    expect(page.locator(f"[href^='{DOCS_URL}']").first).to_be_visible()


def test_scores_show_the_first_alerts_with_their_reasons(page: Page, ui: Ui, save: Save) -> None:
    page.set_viewport_size({"width": 1280, "height": 1280})
    open_partition(page, ui, "scored_transactions", SCORED.key)
    alerts = ui.world.report(SCORED.key, "scored_transactions")["alerts"]
    assert len(alerts) > 3
    for alert in alerts[:3]:
        expect(row_of(page, str(alert["transaction_id"]))).to_contain_text(alert["reason_1"])
    save("alerts", page)


def test_scores_show_the_grades_of_their_weeks(page: Page, ui: Ui, save: Save) -> None:
    open_partition(page, ui, "scored_transactions", SCORED.key)
    dialog = open_dialog(page, "live_quality")
    grades = ui.world.report(SCORED.key, "scored_transactions")["grades"]
    assert len(grades) > 2
    for grade in grades:
        expect(dialog.get_by_role("row").filter(has_text=grade["first_date"])).to_contain_text(f"{grade['frauds']:,}")
    assert_pictures_fit(dialog)
    save("grades", dialog)


def test_scores_show_their_drift(page: Page, ui: Ui, save: Save) -> None:
    page.set_viewport_size({"width": 1280, "height": 1080})
    open_partition(page, ui, "scored_transactions", SCORED.key)
    dialog = open_dialog(page, "drift")
    drift = ui.world.report(SCORED.key, "scored_transactions")["drift"]
    assert {check: found["outcome"] for check, found in drift.items()} == dict.fromkeys(drift, "ok")
    worst = drift["feature_drift"]["inputs"][0]
    expect(dialog.get_by_role("row").filter(has_text=worst["input"])).to_contain_text(f"{worst['psi']:.3g}")
    assert_pictures_fit(dialog)
    save("drift", dialog)


def test_the_model_shows_its_curves(page: Page, ui: Ui, save: Save) -> None:
    page.set_viewport_size({"width": 1280, "height": 1280})
    open_partition(page, ui, "fraud_model", SCORED.key)
    dialog = open_dialog(page, "report")
    expect(dialog.get_by_role("table").first).to_contain_text(f"{average_precision(ui, SCORED.key):.4f}")
    assert_pictures_fit(dialog)
    save("model", dialog)


def test_links_to_mlflow_open_the_run_and_its_model(page: Page, ui: Ui, save: Save) -> None:
    open_partition(page, ui, "fraud_model", SCORED.key)
    model = ui.world.metadata("fraud_model", SCORED.key)
    with page.expect_popup() as opened:
        page.get_by_role("link", name=f"{ui.mlflow}/").click()
    run = opened.value
    expect(run.get_by_role("heading", name=f"fraud_model {SCORED.key}")).to_be_visible()
    expect(run.get_by_text(model["mlflow_run_id"]).first).to_be_visible()
    value = str(average_precision(ui, SCORED.key))
    expect(run.get_by_role("row").filter(has_text=re.compile("^test_average_precision"))).to_contain_text(value[:8])
    close_assistant(run)
    save("mlflow-run", run)

    run.get_by_role("link", name="fraud_model", exact=True).last.click()
    expect(run.get_by_role("link", name="Registered Models")).to_be_visible()


def test_mlflow_shows_the_champion_with_its_card(page: Page, ui: Ui, save: Save) -> None:
    page.goto(f"{ui.mlflow}/#/models/fraud_model")
    row = page.get_by_role("row").filter(has_text="champion_since")
    expect(row).to_contain_text(re.compile(r"@\s*champion"))
    row.get_by_role("link", name="Version 1").click()
    expect(page.get_by_text("Probability that a card transaction is a fraud").first).to_be_visible()
    expect(page.get_by_text("Held-out week").first).to_be_visible()
    close_assistant(page)
    save("mlflow-model", page)


def close_assistant(page: Page) -> None:
    """Close the panel that MLflow opens beside its pages."""
    page.get_by_role("button", name="Close").click()


def test_the_code_location_has_the_version(page: Page, ui: Ui) -> None:
    page.goto(f"{ui.dagster}/locations/ml_platform")
    expect(row_of(page, "ml-platform")).to_contain_text(PLATFORM_VERSION)


def test_the_sensor_gives_the_reason_of_its_last_tick(page: Page, ui: Ui, save: Save) -> None:
    with ui.world.instance() as instance:
        wait_until(lambda: ticks(instance), "the sensor has ticked", TIMEOUT_S)
    page.goto(f"{ui.dagster}/automation")
    page.get_by_role("link", name="new_raw_files").click()
    page.get_by_role("button", name="0 runs requested").click()
    expect(page.get_by_role("dialog")).to_contain_text(f"{len(KEYS)} raw files, all have a cleaned counterpart")
    save("sensor", page.get_by_role("dialog"))


def test_clicks_materialize_a_partition(page: Page, ui: Ui) -> None:
    with ui.world.instance() as instance:
        wait_until(lambda: ticks(instance), "the sensor leaves the new file alone: it has ticked before", TIMEOUT_S)
    write_raw(ui.world, NEW, lines=NEW_LINES)
    ui.world.register(NEW.key)
    open_partition(page, ui, "cleaned_transactions", NEW.key)
    page.get_by_role("button", name="Materialize").first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(NEW.key)
    dialog.get_by_role("button", name="Launch 1 run").click()
    expect(page.get_by_text(f"Materialized ({len(KEYS) + 1})")).to_be_visible()
    # Of the partition itself, the page shows what was there when it was loaded. The file's header is no row.
    page.reload()
    expect(page.get_by_role("row", name=f"raw_rows {NEW_LINES - 1}").last).to_be_visible()
    assert ui.world.report(NEW.key)["counts"]["raw_rows"] == NEW_LINES - 1
