"""What scores say while a run trains: the best step, and a comparison with the start weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from source_files import class_folders, fill, names_of

from ssl_pretrain import config
from ssl_pretrain.errors import UserError
from ssl_pretrain.loop.guard import Guard
from ssl_pretrain.loop.score import KnnScore
from ssl_pretrain.pretext import Recipe


def guard(before: dict[str, Any] | None = None, **flags: Any) -> Guard:
    run: Any = SimpleNamespace(
        **{"keep_best": "knn", "knn_drop": 3.0, "warmup_steps": 10, "out": Path("runs/x"), **flags}
    )
    return Guard(run, {"knn": "a", "knn_original": "b", "val": "c"}, before or {})


def fed(of: Guard, group: str, *scores: float, start: int = 0, every: int = 10) -> list[int]:
    """The steps at which something was said about these scores."""
    steps = [start + i * every for i in range(len(scores))]
    return [step for step, score in zip(steps, scores, strict=True) if of.judge(group, score, step)]


def test_the_best_is_the_first_of_the_highest() -> None:
    one = guard()
    assert one.best is None
    fed(one, "knn", 40.0, 44.0, float("nan"), 44.0, 43.0, start=10)
    assert one.best is not None
    assert (one.best.best, one.best.best_step, one.best.last) == (44.0, 20, 43.0)


def test_the_best_validation_loss_is_the_lowest() -> None:
    one = guard(keep_best="val")
    fed(one, "knn", 40.0, 44.0, start=10)
    fed(one, "val", 2.0, float("nan"), 1.5, 1.5, float("-inf"), start=10)
    assert one.best is not None
    assert (one.best.best, one.best.best_step) == (1.5, 30)


def test_a_domain_score_below_the_start_is_said_once_until_it_recovers() -> None:
    """Not in the warm-up (10 steps), at the start score exactly, or again before a recovery."""
    assert fed(guard(), "knn", 50.0, 45.0, 50.0, 49.9, 40.0, 51.0, 48.0, 47.0) == [30, 60]


def test_an_original_score_may_lose_so_many_points() -> None:
    assert fed(guard(), "knn_original", 80.0, 77.0, 76.9, 70.0, 77.0, 76.0) == [20, 50]
    assert fed(guard(knn_drop=10.0), "knn_original", 80.0, 77.0, 70.0, 69.9) == [30]


def test_a_run_from_random_weights_is_not_compared() -> None:
    assert fed(guard(), "knn", 50.0, 10.0, 5.0, start=20) == []
    assert fed(guard(), "val", 1.0, 2.0, 3.0) == []


def test_the_sentence_names_both_scores_and_the_best_step() -> None:
    one = guard()
    fed(one, "knn", 50.0, 52.25)
    (said,) = one.judge("knn", 44.5, 20)
    for words in ("44.5 %", "50.0 %", "52.2 % at step 10", "runs/x/best", "--lr"):
        assert words in said
    (said,) = guard(keep_best=None).judge("knn", 0.0, 0) or [""]
    assert said == ""
    fed(one, "knn_original", 90.0)
    (said,) = one.judge("knn_original", 60.0, 20)
    for words in ("from 90.0 %", "to 60.0 %", "--knn-drop 3", "on the run's domain was 52.2 % at step 10"):
        assert words in said


def test_a_resumed_run_knows_what_was_known() -> None:
    """Whatever the step that it was stopped after, the same is said at the same steps, and the best is the same."""
    scores = [50.0, 45.0, 55.0, 49.0, 40.0, 51.0, 48.0, 47.0]
    whole = guard()
    said = fed(whole, "knn", *scores)
    for cut in range(1, len(scores)):
        first = guard()
        before = fed(first, "knn", *scores[:cut])
        second = guard(first.record)
        assert before + fed(second, "knn", *scores[cut:], start=10 * cut) == said
        assert second.record == whole.record


def test_scores_of_other_images_are_forgotten() -> None:
    one = guard()
    fed(one, "knn", 50.0, 60.0)
    fed(one, "val", 3.0, 2.0)
    record = one.record
    record["knn"]["images"] = "others"
    second = guard(record)
    assert second.best is None
    assert fed(second, "knn", 10.0, start=30) == []
    assert second.record["val"] == one.record["val"]


# ---- The images that decide.


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))


def scores(data: Path, **flags: Any) -> dict[str, KnnScore]:
    given = {"method": "mae", "data": str(data), "knn_every": 5, "workers": 0, **flags}
    return KnnScore.while_training(config.Run(**given))


def splits_of(score: KnnScore) -> set[str]:
    return {name.partition("/")[0] for name in names_of(score.bank) | names_of(score.queries)}


def test_a_score_that_decides_sees_no_test_image(tmp_path: Path) -> None:
    root = fill(tmp_path / "d", class_folders("train", "val", "test", images=8))
    assert splits_of(scores(root)["knn"]) == {"train", "test"}  # of a curve that nothing is chosen by
    for flags in ({"keep_best": "knn"}, {"init_from": Path("x")}, {"knn_data": str(root)}):
        for train_split in (None, "all", "test"):
            assert splits_of(scores(root, train_split=train_split, **flags)["knn"]) == {"train"}
    found = scores(root, knn_original=str(root), keep_best="knn")
    assert splits_of(found["knn_original"]) == {"train"}
    for score in found.values():
        assert not names_of(score.bank) & names_of(score.queries)


def test_another_domain_may_be_scored_where_the_own_images_have_no_labels(tmp_path: Path) -> None:
    labelled = fill(tmp_path / "a" / "d", class_folders("train", images=8))
    plain = fill(tmp_path / "b" / "d", {f"{i}.png": i for i in range(8)})
    assert scores(plain, knn_original=str(labelled)).keys() == {"knn_original"}
    assert scores(plain, knn_data=str(labelled), knn_original=str(labelled)).keys() == {"knn", "knn_original"}
    for flags in ({}, {"knn_original": str(labelled), "keep_best": "knn"}, {"knn_data": str(plain)}):
        with pytest.raises(UserError, match=r"--knn-every 5 scores by labels, and .* has none"):
            scores(plain, **flags)
    with pytest.raises(UserError, match=r"--knn-original .* has no labels"):
        scores(labelled, knn_original=str(plain))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"keep_best": "knn"}, "--keep-best knn needs scores .* --knn-every"),
        ({"keep_best": "val"}, "--keep-best val needs a validation loss .* --val-images"),
        ({"knn_data": "photos"}, "--knn-data photos is scored while training: give --knn-every"),
        ({"knn_original": "photos"}, "--knn-original photos is scored while training: give --knn-every"),
    ],
)
def test_a_flag_without_the_scores_it_needs_is_refused(flags: dict[str, Any], said: str) -> None:
    run = config.Run(method="mae", **flags)
    with pytest.raises(UserError, match=said):
        config.resolve(run, Recipe(), 100, "fp32")


def test_the_flags_may_change_when_a_run_resumes() -> None:
    assert {"knn_data", "knn_original", "knn_drop", "keep_best"} <= config.CHANGEABLE
