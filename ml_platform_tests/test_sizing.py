"""The number of nodes follows the rows."""

import pytest

from ml_platform.dataproc import sizing
from ml_platform.dataproc.sizing import CORE_SECONDS_PER_MILLION_ROWS, FIXED_S, choose_nodes, cores_of, expected_seconds

CLEAN, FEATURES, SCORES = (
    CORE_SECONDS_PER_MILLION_ROWS[job] for job in ("clean_transactions", "build_features", "score_transactions")
)


def nodes(rows: int, **changes: object) -> int:
    options = {"cores": 4, "least": 3, "most": 10, "target_s": 900.0} | changes
    return choose_nodes("clean_transactions", rows, **options).nodes  # type: ignore[arg-type]


def test_little_work_gets_the_fewest_and_much_work_the_most_nodes():
    assert nodes(0) == nodes(1) == 3
    assert nodes(10**12) == 10


def test_nodes_grow_with_the_rows_and_never_shrink():
    chosen = [nodes(millions * 10**6) for millions in range(0, 2000, 50)]
    assert chosen == sorted(chosen)
    assert set(chosen) == set(range(3, 11))


def test_the_fewest_nodes_that_reach_the_target_are_chosen():
    rows = 500_000_000
    sizing = choose_nodes("build_features", rows, cores=4, least=1, most=32, target_s=300)
    work = FEATURES * rows / 1e6
    assert work / (4 * sizing.nodes) <= 300 < work / (4 * (sizing.nodes - 1))
    assert f"expected to take {FIXED_S + work / (4 * sizing.nodes):,.0f} s" in sizing.reason


def test_cleaning_allows_for_the_features_and_scores_that_follow():
    one = choose_nodes("clean_transactions", 10**8, cores=1, least=1, most=1, target_s=1)
    assert f"expected to take {FIXED_S + 100 * (CLEAN + 3 * FEATURES + SCORES):,.0f} s" in one.reason


def test_more_cores_need_fewer_nodes():
    assert nodes(10**9, cores=16) < nodes(10**9, cores=4)


def test_the_reason_names_rows_choice_range_and_time():
    reason = choose_nodes("clean_transactions", 47_000_000, cores=4, least=3, most=10, target_s=900).reason
    for part in ("3 nodes of 4 cores", "of 3 to 10", "47,000,000 rows", "the target is 900 s"):
        assert part in reason


def test_a_job_takes_its_fixed_time_and_a_share_of_each_core():
    assert expected_seconds("clean_transactions", 10**7, 10) == pytest.approx(FIXED_S + CLEAN)
    assert expected_seconds("another_job", 10**7, 10) == FIXED_S
    assert expected_seconds("clean_transactions", 10**6, 0) == pytest.approx(FIXED_S + CLEAN)


def test_a_training_fits_at_most_its_limit_of_rows():
    def seconds(rows):
        return expected_seconds("train_model", rows, cores=10**9) - FIXED_S

    assert seconds(10**6) == pytest.approx(sizing.FIT_S_PER_MILLION_ROWS, rel=0.01)
    assert seconds(10**8) == pytest.approx(seconds(5 * 10**6), rel=0.01)


def test_the_largest_fit_has_its_memory_and_two_executors_fit_a_default_host():
    assert sizing.memory_properties("clean_transactions") == {}
    scoring = sizing.memory_properties("score_transactions")
    assert scoring == {"spark.executor.memory": "2g", "spark.executor.memoryOverhead": "3000m"}
    properties = sizing.memory_properties("train_model")
    overhead = int(properties["spark.executor.memoryOverhead"].removesuffix("m"))
    assert overhead > 2953
    assert 2 * (2048 + overhead) <= 0.8 * 16 * 1024
    assert sizing.memory_properties("train_model", 1_000_000)["spark.executor.memoryOverhead"] == "1200m"


@pytest.mark.parametrize(
    ("preset", "cores"), [("s3-c4-m16", 4), ("s2-c32-m128", 32), ("m3-c10-m80", 10), ("s2.small", None), ("", None)]
)
def test_cores_are_read_off_a_presets_name(preset, cores):
    assert cores_of(preset) == cores
