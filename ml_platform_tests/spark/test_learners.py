"""Learners and model files: fits, scores, contributions, and what is refused. No Spark."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from spark_jobs.training import learners
from spark_jobs.training.learners import LEARNERS, ModelError, NewerModelError, Scorer

pytestmark = pytest.mark.images

FEATURES = ["amount", "risk", "noise"]
SMALL = {"xgboost": {"rounds": 20, "max_depth": 3}, "logistic_regression": {"C": 1.0}}


def rows(number=2000, seed=0):
    """A matrix and its labels, which follow the second input and, from a threshold on, the first."""
    draw = np.random.RandomState(seed)
    matrix = np.column_stack([draw.exponential(50, number), draw.normal(size=number), draw.normal(size=number)])
    chance = 1 / (1 + np.exp(-(2 * matrix[:, 1] - 3 + 3 * (matrix[:, 0] > 150))))
    return matrix.astype("f4"), (draw.uniform(size=number) < chance).astype("i4")


@pytest.fixture(scope="module", params=list(LEARNERS))
def scorer(request):
    matrix, label = rows()
    params = SMALL[request.param]
    return Scorer(
        request.param, FEATURES, LEARNERS[request.param].fit(matrix, label, np.ones(len(label)), params, 0, 2)
    )


def changed(scorer, **parts):
    return json.dumps({**json.loads(scorer.to_json()), **parts})


class TestModels:
    def test_scores_are_probabilities_that_find_the_frauds(self, scorer):
        from sklearn.metrics import roc_auc_score

        matrix, label = rows(seed=1)
        scores = scorer.score(matrix)
        assert (scores.dtype, scores.shape) == (np.float64, (len(matrix),))
        assert ((scores > 0) & (scores < 1)).all()
        assert roc_auc_score(label, scores) > 0.85
        assert scores.mean() == pytest.approx(label.mean(), rel=0.2)

    def test_contributions_add_up_to_the_log_odds(self, scorer):
        matrix, _ = rows(seed=1)
        parts = scorer.contributions(matrix)
        assert parts.shape == (len(matrix), len(FEATURES) + 1)
        scores = scorer.score(matrix)
        assert parts.sum(axis=1) == pytest.approx(np.log(scores / (1 - scores)), abs=1e-4)
        assert np.ptp(parts[:, -1]) == 0

    def test_a_loaded_model_is_the_same(self, scorer):
        matrix, _ = rows(seed=1)
        text = scorer.to_json()
        for again in (Scorer.from_json(text), Scorer.from_json(text.encode(), threads=4)):
            assert again.features == FEATURES
            assert (again.score(matrix) == scorer.score(matrix)).all()
            assert (again.contributions(matrix) == scorer.contributions(matrix)).all()
            assert again.to_json() == text

    def test_a_rows_score_does_not_depend_on_other_rows(self, scorer):
        matrix, _ = rows(seed=1)
        scores = scorer.score(matrix)
        assert (np.concatenate([scorer.score(matrix[n : n + 1]) for n in range(100)]) == scores[:100]).all()
        assert (scorer.score(matrix[::-1].astype("f8"))[::-1] == scores).all()
        assert len(scorer.score(matrix[:0])) == 0

    def test_the_same_fit_gives_the_same_file(self, scorer):
        matrix, label = rows()
        learner, weight = LEARNERS[scorer.learner], np.ones(len(label))
        for threads in (1, 2, 8):
            model = learner.fit(matrix, label, weight, SMALL[scorer.learner], 0, threads)
            assert Scorer(scorer.learner, FEATURES, model).to_json() == scorer.to_json()

    def test_a_seed_draws_other_rows_for_the_trees(self):
        matrix, label = rows()
        params = {**SMALL["xgboost"], "subsample": 0.5}
        scores = [
            LEARNERS["xgboost"].fit(matrix, label, np.ones(len(label)), params, seed, 1).score(matrix)
            for seed in (1, 1, 2)
        ]
        assert (scores[0] == scores[1]).all()
        assert (scores[0] != scores[2]).any()

    def test_a_weight_counts_as_so_many_rows(self, scorer):
        matrix, label = rows()
        learner, params = LEARNERS[scorer.learner], SMALL[scorer.learner]
        weight = 1.0 + label
        weighted = learner.fit(matrix, label, weight, params, 0, 1)
        twice = np.repeat(np.arange(len(label)), weight.astype("i8"))
        repeated = learner.fit(matrix[twice], label[twice], np.ones(len(twice)), params, 0, 1)
        assert weighted.score(matrix).mean() == pytest.approx(repeated.score(matrix).mean(), rel=0.02)

    def test_reasons_are_the_inputs_that_raise_a_score_most(self, scorer):
        matrix = np.array([[1000, 3, 0], [1, -3, 0]], dtype="f4")
        names, contributions = scorer.reasons(matrix, 2)
        parts = scorer.contributions(matrix)[:, :-1]
        assert set(names[0]) == {"amount", "risk"}
        assert contributions[0].tolist() == sorted(parts[0], reverse=True)[:2]
        for row in range(2):
            assert [name is None for name in names[row]] == np.isnan(contributions[row]).tolist()
            assert (np.nan_to_num(contributions[row], nan=1) > 0).all()
        assert "risk" not in names[1]
        assert scorer.reasons(matrix, 9)[1].shape == (2, 3)

    def test_an_input_that_is_not_a_number_is_named(self, scorer):
        matrix, _ = rows(5)
        matrix[2, 1] = np.nan
        for method in (scorer.score, scorer.contributions):
            with pytest.raises(ValueError, match=r"missing values in risk$"):
                method(matrix)
            with pytest.raises(ValueError, match="takes 3 inputs"):
                method(matrix[:, :2])

    def test_inputs_beyond_32_bits_are_clipped(self, scorer):
        def score(*amounts):
            return scorer.score(np.array([[amount, 0, 0] for amount in amounts])).tolist()

        assert score(1e300, math.inf) == score(learners.LARGEST_INPUT, learners.LARGEST_INPUT)
        assert all(0 <= value <= 1 for value in score(1e300, -1e300, 1e-300))

    def test_a_constant_input_contributes_nothing(self, scorer):
        matrix, label = rows()
        matrix[:, 2] = 7
        model = LEARNERS[scorer.learner].fit(matrix, label, np.ones(len(label)), SMALL[scorer.learner], 0, 1)
        assert not model.contributions(matrix)[:, 2].any()
        assert np.isfinite(model.score(matrix + 1)).all()


class TestModelFile:
    def test_it_names_its_schema_learner_library_and_inputs(self, scorer):
        document = json.loads(scorer.to_json())
        assert list(document) == ["schema_version", "learner", "library", "features", "model"]
        assert document["schema_version"] == learners.MODEL_SCHEMA_VERSION
        assert (document["learner"], document["features"]) == (scorer.learner, FEATURES)
        if scorer.learner == "xgboost":
            import xgboost

            assert document["library"] == {"name": "xgboost", "version": xgboost.__version__}
        else:
            assert document["library"] is None

    @pytest.mark.parametrize(
        ("parts", "told"),
        [
            ({"schema_version": None}, "no schema_version"),
            ({"schema_version": True}, "no schema_version"),
            ({"learner": "gbt"}, "no learner 'gbt'"),
            ({"learner": ["xgboost"]}, "no learner"),
            ({"features": []}, "not distinct names"),
            ({"features": ["a", "a", "b"]}, "not distinct names"),
            ({"features": ["a", 1, "b"]}, "not distinct names"),
            ({"features": ["a", "b"]}, "inputs"),
            ({"model": None}, "not a|not name"),
            ({"model": {}}, "not a|not name"),
            ({"model": []}, "not a|not name"),
        ],
    )
    def test_an_invalid_model_is_refused(self, scorer, parts, told):
        with pytest.raises(ModelError, match=told):
            Scorer.from_json(changed(scorer, **parts))

    @pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"schema_version": 1}'])
    def test_an_invalid_file_is_refused(self, text):
        with pytest.raises(ModelError):
            Scorer.from_json(text)

    def test_a_newer_schema_is_refused_by_name(self, scorer):
        with pytest.raises(NewerModelError, match="of schema 2, and this platform reads up to 1"):
            Scorer.from_json(changed(scorer, schema_version=2))


class TestXGBoostFiles:
    @pytest.fixture(scope="class")
    def document(self):
        matrix, label = rows()
        model = LEARNERS["xgboost"].fit(matrix, label, np.ones(len(label)), SMALL["xgboost"], 0, 1)
        return json.loads(Scorer("xgboost", FEATURES, model).to_json())

    @pytest.fixture
    def copy(self, document):
        return json.loads(json.dumps(document))

    @pytest.mark.parametrize("where", ["header", "model"])
    def test_a_file_of_a_newer_library_is_refused(self, copy, where):
        """The second is what a file of a newer library has whose header was edited."""
        if where == "header":
            copy["library"]["version"] = "99.1.0"
        else:
            copy["model"]["version"] = [99, 1, 0]
        with pytest.raises(NewerModelError, match=r"xgboost 99\.1\.0 wrote the model, and the older xgboost 2\."):
            Scorer.from_json(json.dumps(copy))

    def test_a_file_of_an_older_library_is_read(self, document, copy):
        copy["library"]["version"], copy["model"]["version"] = "1.7.6", [1, 7, 6]
        matrix, _ = rows()
        scores = [Scorer.from_json(json.dumps(each)).score(matrix) for each in (document, copy)]
        assert (scores[0] == scores[1]).all()

    @pytest.mark.parametrize("version", [None, "", "new", 2])
    def test_a_file_without_a_version_is_refused(self, copy, version):
        copy["library"]["version"] = version
        with pytest.raises(ModelError, match="version"):
            Scorer.from_json(json.dumps(copy))

    @pytest.mark.parametrize(
        ("part", "change"),
        [
            ("left_children", lambda values: [10_000, *values[1:]]),
            ("left_children", lambda values: [-7, *values[1:]]),
            ("left_children", lambda values: [0, *values[1:]]),
            ("right_children", lambda values: values[:-1]),
            ("right_children", lambda values: [-1, *values[1:]]),
            ("split_indices", lambda values: [3, *values[1:]]),
            ("split_indices", lambda values: [-1, *values[1:]]),
            ("split_conditions", lambda values: values[1:]),
            ("default_left", lambda values: "x"),
            ("parents", lambda values: [10**9] * len(values)),
            ("parents", lambda values: values[1:]),
            ("split_type", lambda values: [1, *values[1:]]),
            ("categories_nodes", lambda values: [10**8]),
            ("categories_segments", lambda values: [10**9]),
            ("tree_param", lambda values: {**values, "size_leaf_vector": "3"}),
        ],
    )
    def test_trees_with_invalid_nodes_are_refused(self, copy, part, change):
        tree = copy["model"]["learner"]["gradient_booster"]["model"]["trees"][3]
        tree[part] = change(tree[part])
        with pytest.raises(ModelError):
            Scorer.from_json(json.dumps(copy))

    @pytest.mark.parametrize("change", [{"tree_info": [10**6] * 20}, {"tree_info": []}, {"num_class": "3"}])
    def test_trees_of_other_outputs_are_refused(self, copy, change):
        learner = copy["model"]["learner"]
        place = learner["gradient_booster"]["model"] if "tree_info" in change else learner["learner_model_param"]
        assert change.keys() <= place.keys()
        place.update(change)
        with pytest.raises(ModelError, match="do not all belong to one output"):
            Scorer.from_json(json.dumps(copy))

    def test_another_objective_is_refused(self, copy):
        copy["model"]["learner"]["objective"]["name"] = "reg:squarederror"
        with pytest.raises(ModelError, match=r"reg:squarederror .* not binary:logistic"):
            Scorer.from_json(json.dumps(copy))

    @pytest.mark.parametrize(
        "params",
        [
            {"grow_policy": "lossguide", "max_leaves": 7},
            {"gamma": 2, "max_depth": 6},
            {"num_parallel_tree": 3, "subsample": 0.5, "colsample_bynode": 0.5},
            {"monotone_constraints": "(0,1,0)"},
            {"max_depth": 1, "max_bin": 8, "reg_alpha": 1, "scale_pos_weight": 2},
        ],
    )
    def test_trees_of_all_kinds_are_loaded(self, params):
        matrix, label = rows(500)
        LEARNERS["xgboost"].check(params)
        model = LEARNERS["xgboost"].fit(matrix, label, np.ones(500), {**params, "rounds": 5}, 0, 1)
        again = Scorer.from_json(Scorer("xgboost", FEATURES, model).to_json())
        assert (again.score(matrix) == model.score(matrix)).all()


class TestCandidates:
    def test_the_default_is_valid_and_has_every_learner(self):
        learners.check_candidates(learners.DEFAULT_CANDIDATES)
        combinations = learners.grid_points(learners.DEFAULT_CANDIDATES)
        assert {learner for learner, _ in combinations} == set(LEARNERS)
        baseline = [params["C"] for learner, params in combinations if learner == "logistic_regression"]
        assert len(baseline) == 3

    def test_combinations_vary_the_last_parameter_first(self):
        grid = {"rounds": [1, 2], "max_depth": [3, 4]}
        found = learners.grid_points([{"learner": "xgboost", "grid": grid}, {"learner": "logistic_regression"}])
        pairs = [(1, 3), (1, 4), (2, 3), (2, 4)]
        assert found == [
            *[("xgboost", {"rounds": rounds, "max_depth": depth}) for rounds, depth in pairs],
            ("logistic_regression", {}),
        ]

    @pytest.mark.parametrize(
        ("learner", "grid", "told"),
        [
            ("gbt", {}, "no learner 'gbt'; it was replaced by xgboost; choose from xgboost, logistic_regression"),
            ("random_forest", {}, "'random_forest'; it was replaced by xgboost"),
            ("svm", {}, "no learner 'svm'; choose from"),
            ("logistic_regression", {"regParam": [0.1]}, "no parameter regParam; it is now C, the inverse"),
            ("logistic_regression", {"maxIter": [5]}, "no parameter maxIter; it is now rounds for xgboost, max_iter"),
            ("xgboost", {"maxDepth": [5]}, "no parameter maxDepth; it is now max_depth"),
            ("xgboost", {"max_dept": [5]}, "XGBoost has no parameter max_dept"),
            ("xgboost", {"max_depth": [5, "deep"]}, "max_depth = 'deep'"),
            ("xgboost", {"max_depth": [-1]}, "max_depth = -1"),
            ("xgboost", {"subsample": [1.5]}, "subsample = 1.5"),
            ("xgboost", {"rounds": [0]}, "rounds = 0: it must be a whole number of at least 1"),
            ("xgboost", {"rounds": ["many"]}, "rounds = 'many'"),
            ("xgboost", {"n_estimators": [10]}, r"n_estimators is set by the platform \(the number of trees is called"),
            ("xgboost", {"objective": ["binary:hinge"]}, "objective is set by the platform"),
            ("xgboost", {"nthread": [8]}, "nthread is set by the platform"),
            ("xgboost", {"rate_drop": [0.1]}, "XGBoost has no parameter rate_drop"),
            ("logistic_regression", {"C": [0]}, "C = 0: it must be a number above 0"),
            ("logistic_regression", {"C": [math.inf]}, "C = inf"),
            ("logistic_regression", {"C": ["1"]}, "C = '1'"),
            ("logistic_regression", {"max_iter": [1.5]}, "max_iter = 1.5: it must be a whole number"),
            ("logistic_regression", {"penalty": ["l1"]}, "no parameter penalty, only C, max_iter, tol"),
            ("xgboost", {"rounds": 5}, "takes a list of values"),
            ("xgboost", [1], "takes a list of values"),
            ("xgboost", {"rounds": []}, "no combination"),
        ],
    )
    def test_unknown_learners_and_parameters_are_named(self, learner, grid, told):
        with pytest.raises(ValueError, match=told):
            learners.check_candidates([{"learner": learner, "grid": grid}])

    @pytest.mark.parametrize(
        "candidates", [None, {}, "xgboost", ["xgboost"], [{"learner": "xgboost", "grids": {}}], []]
    )
    def test_invalid_candidates_are_refused(self, candidates):
        with pytest.raises(ValueError, match="candidate"):
            learners.check_candidates(candidates)

    def test_names_that_xgboost_has_twice_are_taken(self):
        grid = {"eta": [0.1], "lambda": [1], "alpha": [0], "min_split_loss": [0], "colsample_bylevel": [0.5]}
        learners.check_candidates([{"learner": "xgboost", "grid": grid}])
