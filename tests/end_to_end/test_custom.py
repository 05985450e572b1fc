"""`configs/custom.py`: training from the weights of a folder, or a variant from scratch."""

import numpy as np
import pytest

from mvit_jax import train
from mvit_jax.config import check
from mvit_jax.models.variants import variant
from mvit_jax.training import build, run_folder
from tests.support import tiny


def config(name):
    return tiny.load_config_file("custom").get_config(name)


@pytest.mark.slow
def test_a_folder_sets_the_architecture_and_the_preprocessing(digits, tmp_path):
    run, short = tmp_path / "run", {"epochs": 0.4, "eval.every_epochs": 0.0}
    changes = {"data.mean": (0.1, 0.2, 0.3), "data.stride": 7, "model.heads": 2}
    assert train.train(tiny.config(digits, **short, **changes), str(run)) == 0
    c = config(str(run))
    assert c.init.checkpoint == str(run)
    trained = run_folder.RunFolder(run).config
    assert build.model_config(c, 8) == build.model_config(trained, 8)
    assert (c.data.mean, c.data.stride, c.data.short_side) == ((0.1, 0.2, 0.3), 7, 32)
    # Training starts from the weights of the folder.
    c.data.folder = str(digits)
    c.update_from_flattened_dict({"batch": 8, **short})
    c.augment.mixup_group_size = 1  # one clip a device
    c.optim.lr = 0.0
    assert train.train(c.lock(), str(tmp_path / "tuned")) == 0
    (before, _), (after, _) = (run_folder.read_params(tmp_path / n) for n in ("run", "tuned"))
    kernel = [p["blocks"]["0"]["mlp"]["fc1"]["kernel"] for p in (before, after)]
    np.testing.assert_allclose(kernel[0], kernel[1], atol=1e-5)  # a learning rate near 0


@pytest.mark.parametrize(("name", "image"), [("mvitv2_l_40x3_312", False), ("mvitv2_t", True)])
def test_a_variant_sets_the_preprocessing(name, image):
    c = config(name)
    check(c)
    assert c.init.checkpoint is None
    assert build.model_config(c, 5) == variant(name, num_classes=5)
    assert c.data.short_side == (256 if image else 356)
    assert c.data.mean == (0.485, 0.456, 0.406)
    assert c.data.interpolation == ("bicubic" if image else "bilinear")
    assert c.eval.clips == (1 if image else 5)


def test_a_name_that_is_neither_folder_nor_variant_is_an_error():
    with pytest.raises(ValueError, match="not 'mvitv2_s_16x3'; did you mean 'mvitv2_s"):
        config("mvitv2_s_16x3")
