"""Grades of the scores, as the reports of scored partitions hold them."""

from __future__ import annotations

from ml_platform.lake.reports import Grade, ScoredReports


def valid_grades(scored: ScoredReports) -> list[Grade]:
    """The newest grade of each week and version, by week, of scores that are still there as they were graded."""
    newest: dict[tuple[int, int], Grade] = {}
    for report in scored.values():
        for grade in report.grades:
            place = grade.week, grade.model_version
            is_valid = all(key in scored and scored[key].run_id == run for key, run in grade.scores.items())
            if is_valid and (place not in newest or newest[place].graded_at < grade.graded_at):
                newest[place] = grade
    return [newest[place] for place in sorted(newest)]


def newest_grade(scored: ScoredReports, version: int) -> Grade | None:
    """The grade of a version's last known week; None without one."""
    return next((grade for grade in reversed(valid_grades(scored)) if grade.model_version == version), None)


def problem_of_grade(grade: Grade) -> str | None:
    """A week's average precision must not be certainly below that of the version's held-out week."""
    held_out, upper = grade.held_out, grade.average_precision_upper
    if held_out is None or upper is None or upper >= held_out.lower:
        return None
    return (
        f"version {grade.model_version}, {grade.first_date} to {grade.last_date}: average precision "
        f"{grade.average_precision:.3f} (at most {upper:.3f}), but {held_out.average_precision:.3f} (at least "
        f"{held_out.lower:.3f}) in its held-out week"
    )
