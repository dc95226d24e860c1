"""Learners and their models: train, score, explain, save and load. Needs numpy and the learner's own library.

This module is independent of Spark and the rest of the platform: jobs, the promotion gate and MLflow's model all score
with it, and MLflow's model contains a copy. A new learner is a class with the members of `Learner`, added to
`LEARNERS`.

A matrix has one row per transaction and one column per input, in the order of the model's `features`.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import warnings
from typing import TYPE_CHECKING, Any, Iterable, Protocol, Sequence

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Version of the model file. Files of a newer version are rejected.
MODEL_SCHEMA_VERSION = 1

#: Inputs are clipped here, so that neither the 32-bit value nor its double, which XGBoost computes, overflows.
LARGEST_INPUT = 1e37

#: Rows of a matrix that are converted at a time.
ROWS_PER_PIECE = 1 << 14

#: Default search grids. ``rounds`` is the number of boosted trees; C is the inverse of the penalty.
DEFAULT_CANDIDATES: list[dict[str, Any]] = [
    {
        "learner": "xgboost",
        "grid": {
            "rounds": [120],
            "max_depth": [4, 5],
            "learning_rate": [0.1],
            # Average precision depends on the bins: with few, no split separates the rare large amounts.
            "max_bin": [1024],
            "min_child_weight": [5],
            "reg_lambda": [10],
            "colsample_bynode": [0.5],
        },
    },
    {"learner": "logistic_regression", "grid": {"C": [0.0001, 0.01, 1]}},
]


class ModelError(ValueError):
    """A model file cannot be used; the message says why."""


class NewerModelError(ModelError):
    """A model file was written by a newer library or platform than this one, which would misread it."""


class Model(Protocol):
    """A fitted model."""

    def score(self, matrix: Array) -> Array:
        """Probability of fraud of each row of a float32 matrix, float64."""

    def contributions(self, matrix: Array) -> Array:
        """Contribution of each input to a row's log-odds, one column per input; last column: base value. float64.

        The columns of a row add up to the log-odds of its score.
        """

    def to_json(self) -> str:
        """The model as JSON: the same text for the same model, without paths, times or run ids."""


class Learner(Protocol):
    """Fits one kind of model."""

    #: The package needed for scoring, None for numpy alone; its version is in the model file.
    library: str | None

    def check(self, params: dict[str, Any]) -> None:
        """Raise ValueError, naming the parameter, if `fit` does not accept `params`."""

    def relative_cost(self, params: dict[str, Any]) -> float:
        """Duration of a fit relative to others."""

    def fit(self, matrix: Array, label: Array, weight: Array, params: dict[str, Any], seed: int, threads: int) -> Model:
        """Fit a float32 matrix with a label (0 or 1) and a weight per row; the same input gives the same model."""

    def from_json(self, content: Any, features: int, threads: int) -> Model:
        """Load a model from parsed `to_json`. Raises ModelError unless it is one with this number of `features`."""


#: XGBoost parameters set by the platform: scores are probabilities of fraud and the same on every machine.
_RESERVED = (
    *("objective", "booster", "tree_method", "device", "nthread", "n_jobs", "seed", "random_state", "num_class"),
    *("seed_per_iteration", "verbosity", "validate_parameters", "updater", "process_type", "num_boost_round"),
    *("n_estimators", "eval_metric", "disable_default_eval_metric"),
)


#: More inputs than any parameter refers to.
_MANY_INPUTS = 256


class XGBoost:
    """Gradient-boosted trees (Chen and Guestrin, 2016, https://doi.org/10.1145/2939672.2939785), method ``hist``."""

    library: str | None = "xgboost"

    def check(self, params: dict[str, Any]) -> None:
        import numpy as np

        for name in params:
            if name in _RESERVED:
                hint = " (the number of trees is called rounds)" if name in ("num_boost_round", "n_estimators") else ""
                raise ValueError(f"{name} is set by the platform{hint}")
        rounds = params.get("rounds", 1)
        if not (type(rounds) is int and rounds >= 1):
            raise ValueError(f"rounds = {rounds!r}: it must be a whole number of at least 1")
        xgboost = _xgboost()
        # XGBoost itself validates parameters and values. Of unknown names it only warns.
        tiny = np.arange(8 * _MANY_INPUTS, dtype="f4").reshape(8, _MANY_INPUTS)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.fit(tiny, np.arange(8) % 2, np.ones(8), {**params, "rounds": 1}, 0, 1, verbosity=1)
        except (xgboost.core.XGBoostError, TypeError, ValueError) as error:
            listed = ", ".join(f"{name} = {value!r}" for name, value in params.items())
            raise ValueError(f"{listed}: {_first_line(error)}") from None
        for warning in caught:
            unknown = re.search(r"Parameters: \{ (.*) \} are not used", str(warning.message))
            if unknown:
                raise ValueError("XGBoost has no parameter {}".format(unknown[1].replace('"', "")))

    def relative_cost(self, params: dict[str, Any]) -> float:
        depth = params.get("max_depth", 6)
        return 10.0 * params.get("rounds", 100) * (depth if isinstance(depth, int) else 6)

    def fit(
        self,
        matrix: Array,
        label: Array,
        weight: Array,
        params: dict[str, Any],
        seed: int,
        threads: int,
        verbosity: int = 0,
    ) -> XGBoostModel:
        import numpy as np

        xgboost = _xgboost()
        params = dict(params)
        rounds = params.pop("rounds", 100)
        bins = {"max_bin": params["max_bin"]} if "max_bin" in params else {}
        # Weights that are all 1 change nothing but cost time.
        weights = {} if np.all(weight == 1) else {"weight": weight}
        data = xgboost.QuantileDMatrix(_inputs(matrix), label, nthread=threads, **weights, **bins)
        fixed = {
            "objective": "binary:logistic",
            "booster": "gbtree",
            "tree_method": "hist",
            "device": "cpu",
            "nthread": threads,
            "seed": seed,
            "verbosity": verbosity,
        }
        return XGBoostModel(xgboost.train({**params, **fixed}, data, rounds), threads)

    def from_json(self, content: Any, features: int, threads: int) -> XGBoostModel:
        _check_booster(content, features)
        xgboost = _xgboost()
        booster = xgboost.Booster({"nthread": threads})
        try:
            booster.load_model(bytearray(json.dumps(content).encode()))
        except xgboost.core.XGBoostError as error:
            raise ModelError(f"XGBoost cannot load it: {_first_line(error)}") from None
        return XGBoostModel(booster, threads)


class XGBoostModel:
    """A fitted booster; its scores are XGBoost's own 32-bit probabilities."""

    def __init__(self, booster: Any, threads: int) -> None:
        self._booster = booster
        self._threads = threads
        booster.set_param({"nthread": threads})

    def score(self, matrix: Array) -> Array:
        scores: Array = self._booster.inplace_predict(_inputs(matrix), validate_features=False).astype("f8")
        return scores

    def contributions(self, matrix: Array) -> Array:
        xgboost = _xgboost()
        data = xgboost.DMatrix(_inputs(matrix), nthread=self._threads)
        parts: Array = self._booster.predict(data, pred_contribs=True, validate_features=False).astype("f8")
        return parts

    def to_json(self) -> str:
        text: str = self._booster.save_raw(raw_format="json").decode()
        return text


#: Tolerance of the gradient. scikit-learn versions scale it differently; this is small for all of them, and Newton's
#: method reaches it, so that they give the same coefficients. (L-BFGS stops earlier in some.)
DEFAULT_TOL = 1e-10


class LogisticRegression:
    """Logistic regression with an L2 penalty on standardized inputs, by scikit-learn; the baseline."""

    library: str | None = None

    PARAMETERS = ("C", "max_iter", "tol")

    def check(self, params: dict[str, Any]) -> None:
        for name, value in params.items():
            if name not in self.PARAMETERS:
                raise ValueError("there is no parameter {}, only {}".format(name, ", ".join(self.PARAMETERS)))
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf or (name == "max_iter" and value != int(value)):
                expected = "a whole number of at least 1" if name == "max_iter" else "a number above 0"
                raise ValueError(f"{name} = {value!r}: it must be {expected}")

    def relative_cost(self, params: dict[str, Any]) -> float:
        return 1.0

    def fit(
        self, matrix: Array, label: Array, weight: Array, params: dict[str, Any], seed: int, threads: int
    ) -> LogisticRegressionModel:
        import numpy as np
        from sklearn.linear_model import LogisticRegression as Estimator

        matrix = _inputs(matrix)
        mean, deviation = np.zeros(matrix.shape[1]), np.ones(matrix.shape[1])
        standardized = np.empty(matrix.shape)
        # Column by column, because a copy of all of them takes a gigabyte.
        for number, column in enumerate(matrix.T):
            values = column.astype("f8")
            mean[number] = np.average(values, weights=weight)
            values -= mean[number]
            deviation[number] = np.sqrt(np.average(np.square(values), weights=weight)) or 1.0
            standardized[:, number] = values / deviation[number]
        estimator = Estimator(
            C=params.get("C", 1.0),
            max_iter=int(params.get("max_iter", 1000)),
            tol=params.get("tol", DEFAULT_TOL),
            solver="newton-cg",
        )
        estimator.fit(standardized, label, sample_weight=weight)
        return LogisticRegressionModel(mean, deviation, estimator.coef_[0], float(estimator.intercept_[0]))

    def from_json(self, content: Any, features: int, threads: int) -> LogisticRegressionModel:
        import numpy as np

        try:
            mean, deviation, coefficients = (
                np.array([float(value) for value in content[name]]) for name in ("mean", "deviation", "coefficients")
            )
            intercept = float(content["intercept"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"it is not a logistic regression: {_first_line(error)}") from None
        numbers = np.concatenate([mean, deviation, coefficients, [intercept]])
        if not len(mean) == len(deviation) == len(coefficients) == features:
            raise ModelError(f"it does not have one coefficient for each of {features} inputs")
        if not np.isfinite(numbers).all() or not (deviation > 0).all():
            raise ModelError("a coefficient is not finite, or a deviation is not above 0")
        return LogisticRegressionModel(mean, deviation, coefficients, intercept)


class LogisticRegressionModel:
    """A fitted logistic regression; ``coefficients`` are per standard deviation of an input."""

    def __init__(self, mean: Array, deviation: Array, coefficients: Array, intercept: float) -> None:
        self.mean, self.deviation, self.coefficients, self.intercept = mean, deviation, coefficients, intercept

    def score(self, matrix: Array) -> Array:
        import numpy as np

        # Row by row instead of a matrix product, so that a row's score does not depend on the other rows.
        margin = self._terms(matrix).sum(axis=1) + self.intercept
        # The exp of a negative number cannot overflow.
        small = np.exp(-np.abs(margin))
        scores: Array = np.where(margin >= 0, 1.0, small) / (1.0 + small)
        return scores

    def contributions(self, matrix: Array) -> Array:
        import numpy as np

        terms = self._terms(matrix)
        return np.column_stack([terms, np.full(len(terms), self.intercept)])

    def _terms(self, matrix: Array) -> Array:
        terms: Array = (_inputs(matrix).astype("f8") - self.mean) / self.deviation * self.coefficients
        return terms

    def to_json(self) -> str:
        arrays = {"mean": self.mean, "deviation": self.deviation, "coefficients": self.coefficients}
        return json.dumps({**{name: values.tolist() for name, values in arrays.items()}, "intercept": self.intercept})


LEARNERS: dict[str, Learner] = {"xgboost": XGBoost(), "logistic_regression": LogisticRegression()}

#: Names used before 0.2 and their replacements.
_FORMER_NAMES = {
    "gbt": "xgboost",
    "random_forest": "xgboost",
    "regParam": "C, the inverse of the penalty",
    "maxIter": "rounds for xgboost, max_iter for logistic_regression",
    "numTrees": "rounds",
    "maxDepth": "max_depth",
    "maxBins": "max_bin",
    "stepSize": "learning_rate",
    "subsamplingRate": "subsample",
    "featureSubsetStrategy": "colsample_bynode",
    "minInstancesPerNode": "min_child_weight",
    "minInfoGain": "min_split_loss",
}


def grid_points(candidates: Any) -> list[tuple[str, dict[str, Any]]]:
    """Learner and parameters of every combination of the candidates' grids; the first names of a grid vary slowest.

    Raises ValueError unless `candidates` is a list of {"learner", "grid"} with a learner of `LEARNERS` and lists of
    values.
    """
    import itertools

    if not isinstance(candidates, list):
        raise ValueError(f"candidates is {candidates!r}: it must be a list of learners, each with a grid")
    combinations: list[tuple[str, dict[str, Any]]] = []
    for candidate in candidates:
        if not isinstance(candidate, dict) or not set(candidate) <= {"learner", "grid"}:
            raise ValueError(f"candidate {candidate!r}: its keys are learner and grid")
        learner, grid = candidate.get("learner"), candidate.get("grid") or {}
        if not isinstance(learner, str) or learner not in LEARNERS:
            replacement = _FORMER_NAMES.get(str(learner))
            hint = f"; it was replaced by {replacement}" if replacement else ""
            raise ValueError("there is no learner {!r}{}; choose from {}".format(learner, hint, ", ".join(LEARNERS)))
        if not isinstance(grid, dict) or not all(isinstance(values, list) for values in grid.values()):
            raise ValueError(f"the grid of {learner} takes a list of values for each parameter; it is {grid!r}")
        combinations += [(learner, dict(zip(grid, values))) for values in itertools.product(*grid.values())]
    if not combinations:
        raise ValueError("candidates have no combination to fit")
    return combinations


def check_candidates(candidates: Any) -> None:
    """Raise ValueError, naming the parameter, for a name or value that a learner does not accept."""
    for learner, params in grid_points(candidates):
        for name in params:
            if name in _FORMER_NAMES:
                raise ValueError(f"{learner} has no parameter {name}; it is now {_FORMER_NAMES[name]}")
        try:
            _check_combination(LEARNERS[learner], params)
        except ValueError as error:
            raise ValueError(f"candidates: {learner}: {error}") from None


def _check_combination(learner: Learner, params: dict[str, Any]) -> None:
    """Raise ValueError if a learner does not accept `params`; the message names the value, if it is refused by itself.

    Only then are the values checked one by one, because XGBoost fits a tree for each check.
    """
    try:
        learner.check(params)
    except ValueError:
        for name, value in params.items():
            learner.check({name: value})
        raise


class Scorer:
    """A model file: a fitted model with the names of its inputs.

    Attributes:
        learner: name of the learner.
        features: names of the inputs, in the order of a matrix's columns.
        model: the fitted model.
    """

    def __init__(self, learner: str, features: Sequence[str], model: Model) -> None:
        self.learner = learner
        self.features = list(features)
        self.model = model

    @classmethod
    def from_json(cls, content: bytes | str, threads: int = 1) -> Scorer:
        """Load a model file; `threads` are used to score.

        Raises:
            NewerModelError: a newer library or platform wrote it. XGBoost 2.1.4 reads a file of 3.2.0 without an
                error, but its scores differ by up to 0.62.
            ModelError: it is not a valid model file.
        """
        try:
            document = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"it is not JSON: {_first_line(error)}") from None
        if not isinstance(document, dict) or type(document.get("schema_version")) is not int:
            raise ModelError("it has no schema_version")
        version: int = document["schema_version"]
        if version > MODEL_SCHEMA_VERSION:
            raise NewerModelError(
                f"the model file is of schema {version}, and this platform reads up to {MODEL_SCHEMA_VERSION}: "
                "score with the version that wrote it"
            )
        learner, features = document.get("learner"), document.get("features")
        if not isinstance(learner, str) or learner not in LEARNERS:
            raise ModelError(f"there is no learner {learner!r}")
        are_names = isinstance(features, list) and all(isinstance(name, str) for name in features)
        if not are_names or not features or len(set(features)) != len(features):
            raise ModelError("features are not distinct names")
        if LEARNERS[learner].library is not None:
            _check_library(LEARNERS[learner].library, document)
        return cls(learner, features, LEARNERS[learner].from_json(document.get("model"), len(features), threads))

    def to_json(self) -> str:
        """Content of the model file: the same text for the same model."""
        library = LEARNERS[self.learner].library
        header = {
            "schema_version": MODEL_SCHEMA_VERSION,
            "learner": self.learner,
            "library": {"name": library, "version": installed_version(library)} if library else None,
            "features": self.features,
        }
        # The model's JSON is not re-encoded, so that numbers keep the library's own digits.
        return json.dumps(header)[:-1] + f', "model": {self.model.to_json()}}}\n'

    def score(self, matrix: Array) -> Array:
        """Probability of fraud of each row, float64. Raises ValueError, naming the input, if a value is NaN."""
        self._check(matrix)
        return self.model.score(matrix)

    def contributions(self, matrix: Array) -> Array:
        """Contributions of the inputs to each row's log-odds, float64; last column: base value. Raises as `score`."""
        self._check(matrix)
        return self.model.contributions(matrix)

    def reasons(self, matrix: Array, number: int) -> tuple[list[list[str | None]], Array]:
        """(names of the inputs that raise each row's score most, their contributions in log-odds), `number` per row.

        If fewer inputs raise a score, the rest are None and NaN.
        """
        import numpy as np

        parts = self.contributions(matrix)[:, :-1]
        order = np.argsort(-parts, axis=1, kind="stable")[:, :number]
        largest = np.take_along_axis(parts, order, axis=1)
        names = [
            [self.features[column] if value > 0 else None for column, value in zip(columns, values)]
            for columns, values in zip(order, largest)
        ]
        return names, np.where(largest > 0, largest, np.nan)

    def _check(self, matrix: Array) -> None:
        import numpy as np

        if matrix.ndim != 2 or matrix.shape[1] != len(self.features):
            raise ValueError(f"the model takes {len(self.features)} inputs; the matrix has shape {matrix.shape}")
        # One sum takes a tenth of the time of checking each value.
        if np.isnan(matrix.sum(dtype="f8")):
            missing = [name for name, column in zip(self.features, matrix.T) if np.isnan(column).any()]
            if missing:
                raise ValueError("missing values in {}".format(", ".join(missing)))


def installed_version(library: str | None) -> str:
    """Version of a learner's library in this process."""
    return str(importlib.import_module(str(library)).__version__)


def matrix_of(columns: Any, features: Iterable[str]) -> Array:
    """Float32 matrix of numeric columns (a mapping or a pandas DataFrame), in the order of `features`."""
    import numpy as np

    arrays = [np.asarray(columns[name]) for name in features]
    matrix = np.empty((len(arrays[0]), len(arrays)), dtype="f4")
    # A piece of all columns at a time, which fits into the processor's cache.
    with np.errstate(over="ignore"):
        for begin in range(0, len(matrix), ROWS_PER_PIECE):
            piece = matrix[begin : begin + ROWS_PER_PIECE]
            for number, values in enumerate(arrays):
                piece[:, number] = values[begin : begin + ROWS_PER_PIECE]
            np.clip(piece, -LARGEST_INPUT, LARGEST_INPUT, out=piece)
    return matrix


def _inputs(matrix: Array) -> Array:
    return matrix if matrix.dtype == "f4" else _clipped(matrix)


def _clipped(values: Array) -> Array:
    import numpy as np

    clipped: Array = np.clip(values, -LARGEST_INPUT, LARGEST_INPUT).astype("f4")
    return clipped


def _xgboost() -> Any:
    # By default, OpenMP threads wait in a busy loop, which takes cores from other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # noqa: TID251 - OpenMP reads it
    import xgboost

    return xgboost


def _check_library(library: str | None, document: dict[str, Any]) -> None:
    """Raise NewerModelError if a newer library wrote the model, by the file's header or the library's own version."""
    header = document.get("library")
    recorded = document["model"].get("version") if isinstance(document.get("model"), dict) else None
    if not isinstance(header, dict) or header.get("name") != library or not isinstance(recorded, list):
        raise ModelError(f"it does not name the version of {library}")
    installed = installed_version(library)
    for version in (str(header.get("version")), ".".join(str(part) for part in recorded)):
        if is_newer(version, installed):
            raise NewerModelError(
                f"{library} {version} wrote the model, and the older {library} {installed} would misread it: install "
                f"{library} {version}, or use a model written by {installed} or older"
            )


def is_newer(version: str, than: str) -> bool:
    """True if `version` is newer than `than`. Raises ModelError if one of them is not a version."""
    return _version(version) > _version(than)


def _version(text: str) -> tuple[int, ...]:
    parts = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if not parts:
        raise ModelError(f"{text!r} is not a version")
    return tuple(int(part or 0) for part in parts.groups())


def _check_booster(content: Any, features: int) -> None:
    """Raise ModelError for trees on which XGBoost, which does not check, would read out of bounds or loop forever."""
    try:
        learner = content["learner"]
        inputs, objective = int(learner["learner_model_param"]["num_feature"]), learner["objective"]["name"]
        if inputs != features or objective != "binary:logistic":
            raise ModelError(f"it is a model of {objective} with {inputs} inputs, not binary:logistic with {features}")
        model, parameters = learner["gradient_booster"]["model"], learner["learner_model_param"]
        outputs = max(int(parameters.get(name, "1")) for name in ("num_class", "num_target"))
        if outputs > 1 or any(model["tree_info"]) or len(model["tree_info"]) != len(model["trees"]):
            raise ModelError("its trees do not all belong to one output")
        for tree in model["trees"]:
            _check_tree(tree, features)
    except ModelError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"it is not an XGBoost model: {_first_line(error)}") from None


#: Parent of a tree's first node in XGBoost's files.
ROOT = 2**31 - 1


def _check_tree(tree: Any, features: int) -> None:
    import numpy as np

    left, right, split = (np.array(tree[name], "i8") for name in ("left_children", "right_children", "split_indices"))
    lengths = {len(tree[name]) for name in ("split_conditions", "default_left", "base_weights")}
    if lengths | {len(right), len(split)} != {len(left)}:
        raise ModelError("a tree has parts of different lengths")
    nodes, is_leaf = np.arange(len(left)), left == -1
    for children in (left, right):
        # A child comes after its parent, so every path ends.
        if not np.where(is_leaf, children == -1, (children > nodes) & (children < len(nodes))).all():
            raise ModelError("a tree has a node without its children")
    if not ((split >= 0) & (split < features)).all():
        raise ModelError("a tree splits by an input that the model does not have")
    parents, inner = np.full(len(left), ROOT), np.flatnonzero(~is_leaf)
    parents[left[inner]] = parents[right[inner]] = inner
    if not np.array_equal(parents, np.array(tree["parents"], "i8")):
        raise ModelError("a tree has a node that does not name its parent")
    categories = (tree.get(name) for name in ("categories", "categories_nodes", "categories_segments"))
    if any(tree.get("split_type", ())) or any(categories) or int(tree["tree_param"].get("size_leaf_vector", "1")) > 1:
        raise ModelError("a tree has categories, or vectors in its leaves")


def _first_line(error: BaseException) -> str:
    """First line of an error's message, without the source location that XGBoost adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", lines[0])[:300]
