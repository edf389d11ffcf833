"""Encoders in other people's code: the examples of docs/guides/use_encoder.md, and the transformer for scikit-learn."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, picture
from oracles import import_torchvision
from PIL import Image
from torch.utils.data import DataLoader

from ssl_pretrain import backbones, encoder
from ssl_pretrain.data.source import open_source
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import EncoderTransformer, extract

PAGE = (ROOT / "docs" / "guides" / "use_encoder.md").read_text()
EXAMPLES = {
    heading: re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]  # type: ignore[index]
    for heading, text in re.findall(r"^#+ (.*?)\n(.*?)(?=^#+ |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}
# torchvision does not import beside a CPU build of torch without it.
PRELUDE = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport oracles\noracles.import_torchvision()\n"


@pytest.fixture(scope="module")
def model() -> Encoder:
    torch.manual_seed(0)
    backbone = backbones.build("vit_micro", image_size=(32, 32), patch_size=8, depth=2, positions="sincos")
    return Encoder(backbone, "vit_micro", Preprocessing.for_size((32, 32), (0.5,) * 3, (0.2,) * 3), {}).eval()


@pytest.fixture(scope="module")
def place(desk: Path, model: Encoder) -> Path:
    """The folder that the examples are run in, with an export in runs/mae."""
    encoder.save(desk / "runs" / "mae" / "encoder", model)
    return desk


def test_the_examples_are_found() -> None:
    assert list(EXAMPLES) == [
        "Using an encoder in your own code", "A data loader", "scikit-learn", "bfloat16", "torch.compile",
        "A feature pyramid for detectors",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("heading", EXAMPLES)
def test_an_example_runs_as_it_stands(heading: str, place: Path) -> None:
    code = EXAMPLES[heading]
    if "torchvision" in code:
        import_torchvision()
        code = PRELUDE + code
    if "sklearn" in code:
        pytest.importorskip("sklearn")
    (place / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=place, capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr


# ---- The transform of a loader.


def test_the_transform_of_a_picture_is_what_the_encoder_does(model: Encoder) -> None:
    pictures: list[Any] = [picture(0), np.asarray(picture(1)), picture(2, (64, 40)).convert("L")]
    together = model.preprocess(pictures)
    for one, row in zip(pictures, together, strict=True):
        assert torch.equal(model.preprocessing(one), row)
    with pytest.raises(UserError, match="image to encode: "):
        model.preprocessing(b"no picture")


def test_the_transform_goes_to_a_loaders_processes(model: Encoder) -> None:
    assert len(pickle.dumps(model.preprocessing)) < 1000
    pictures = [picture(i) for i in range(6)]
    loader: Any = DataLoader(
        pictures, 3, num_workers=1, multiprocessing_context="fork",
        collate_fn=lambda images: torch.stack(list(map(model.preprocessing, images))),
    )  # type: ignore[arg-type, type-var]  # fmt: skip
    assert torch.equal(torch.cat(list(loader)), model.preprocess(pictures))


# ---- scikit-learn.


def test_features_are_those_of_the_evaluators(model: Encoder, place: Path) -> None:
    photos = open_source(str(place / "labelled-photos"), "train")
    files = [next((place / "labelled-photos").rglob(Path(photos.name(i)).name)) for i in range(len(photos))]
    for feature in ("pooled", "cls", "mean@-2"):
        wanted = extract(model, photos, [feature], cache=False).features[feature]
        found = EncoderTransformer(model, feature=feature, batch_size=7).fit_transform(files)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert found.dtype == np.float32


def test_paths_pictures_arrays_and_bytes_are_the_same(model: Encoder, place: Path) -> None:
    file = place / "cat.jpg"
    with Image.open(file) as image:
        kinds = [str(file), file, image, np.asarray(image.convert("RGB")), file.read_bytes()]
        rows = EncoderTransformer(model).transform(kinds)
    assert rows.shape == (5, model.backbone.dim)
    assert (rows == rows[0]).all()
    assert EncoderTransformer(model).transform([]).shape == (0, model.backbone.dim)


def test_scikit_learn_takes_it(place: Path) -> None:
    pytest.importorskip("sklearn")
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import Pipeline

    files = sorted((place / "labelled-photos" / "train").glob("*/*.jpg"))
    labels = [file.parent.name for file in files]
    steps = [("encoder", EncoderTransformer(place / "runs/mae")), ("classifier", LogisticRegression(max_iter=500))]
    search = GridSearchCV(Pipeline(steps), {"encoder__feature": ["pooled", "cls"], "classifier__C": [0.1, 1.0]}, cv=2)
    search.fit(list(map(str, files)), labels)
    best = search.best_params_
    rows = EncoderTransformer(place / "runs/mae", feature=best["encoder__feature"]).transform(files)
    alone = LogisticRegression(max_iter=500, C=best["classifier__C"]).fit(rows, labels)
    np.testing.assert_allclose(search.predict_proba(files), alone.predict_proba(rows), atol=1e-4)
    copied = clone(search.best_estimator_)
    assert copied.get_params()["encoder__feature"] == search.best_params_["encoder__feature"]
    assert not hasattr(copied["encoder"], "encoder_")
    stored = pickle.loads(pickle.dumps(search.best_estimator_))
    assert list(stored.predict(files)) == list(search.predict(files))
    names = Pipeline(steps[:1]).get_feature_names_out()
    assert list(names[:2]) == ["pooled_0", "pooled_1"]
    assert len(names) == 128
    repr(Pipeline(steps))


def test_it_is_there_without_scikit_learn() -> None:
    program = "import sys; import ssl_pretrain.features; assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_mistakes_are_named(model: Encoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown feature 'poold'; did you mean"):
        EncoderTransformer(model, feature="poold").fit()
    with pytest.raises(UserError, match="does not exist"):
        EncoderTransformer(tmp_path / "none").transform([])
    with pytest.raises(UserError, match=r"nothing\.jpg: No such file"):
        EncoderTransformer(model).transform([tmp_path / "nothing.jpg"])
    with pytest.raises(UserError, match="image 0 of the 1 to encode"):
        EncoderTransformer(model).transform([b"no picture"])
    with pytest.raises(ValueError, match="no parameter 'size'; it has encoder"):
        EncoderTransformer(model).set_params(size=3)
