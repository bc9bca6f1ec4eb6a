"""The diffusion classifier and Diff-C on a GPU."""

import numpy as np
import planted_pictures
import pytest
import torch

from vaelab.models.loading import load_pipeline
from vaelab.probing import dataset, diffc
from vaelab.probing.diffusion_classifier import DiffusionClassifier, Stages
from vaelab.probing.linear import measure_accuracy

pytestmark = pytest.mark.cuda
NEAR = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


@pytest.mark.parametrize("precision", NEAR)
@pytest.mark.parametrize("name", ["sd", "dit", "sd3"])
def test_the_diffusion_classifier_compares_the_cpus_errors(device, pipeline_folder, small_pipeline, name, precision):
    prompts = [3, 77, 400] if name == "dit" else ["a red circle", "a blue square", "two stars"]
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pipeline = load_pipeline(str(pipeline_folder(name)), device=str(device), precision=precision)
    stages = Stages((4,), (1,))
    found = DiffusionClassifier(pipeline, prompts, stages).classify(pixels)
    expected = DiffusionClassifier(small_pipeline(name), prompts, stages).classify(pixels)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.errors, other.errors, rtol=NEAR[precision])
        assert one.passes == other.passes == 12


@pytest.mark.parametrize("precision", NEAR)
def test_diffc_learns_what_is_planted(device, tmp_path, precision):
    truth = [planted_pictures.labels(count, seed) for seed, count in enumerate((60, 24, 60))]
    stores = [planted_pictures.fill(tmp_path / str(seed), one, seed=seed) for seed, one in enumerate(truth)]
    learn, validate, test = (dataset.load_examples(store, "shape") for store in stores)
    config = diffc.DiffCConfig(
        width=16, epochs=20, batch_size=8, learning_rate=1e-2, final_rate=5e-3, device=str(device),
        training_precision=precision,
    )  # fmt: skip
    model = diffc.train_together({"": learn}, {"": validate}, "up.t25.maps", config)[""].model
    predicted = diffc.classify_stored([model], test, "up.t25.maps")[0]
    # float16's loss scaler skips the first steps, so that it ends with other weights than float32 does
    assert measure_accuracy(predicted, test.labels, learn.labels).accuracy > 0.9
