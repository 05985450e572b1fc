"""Abstract state and batch of a training step, compared with real arrays."""

import jax
import numpy as np
import pytest

from mvit_jax.data import pipeline
from mvit_jax.data.formats.synthetic import Synthetic
from mvit_jax.training import build
from mvit_jax.training.distributed import sharding
from tests.support import tiny
from tests.support.ava_folder import FLAGS, write_ava


@pytest.mark.parametrize("multi_label", [pytest.param(False, marks=pytest.mark.slow), True])
def test_abstract_shapes_and_shardings_equal_those_of_real_arrays(multi_label):
    changes = {"data.multi_label": multi_label, "augment.mixup": 0.0, "augment.cutmix": 0.0}
    config = tiny.config("", **{"data.stride": 1, **changes})
    videos = Synthetic(videos=16, classes=5, height=32, width=40, multi_label=multi_label)
    model = build.model_config(config, 5)
    mesh = sharding.make_mesh(2, 4, jax.devices())
    with jax.set_mesh(mesh):
        abstract = build.program(config, build.settings(config, 5), mesh)
        settings = build.settings(config, model.num_classes).clips
        batches = pipeline.train_batches(videos, settings, seed=0, batch=config.batch, steps=1)
        batch = sharding.to_devices(next(iter(batches)), mesh)
        state = abstract.initial_state()
        assert_same_shapes(abstract.state, state)
        assert_same_shapes(build.batch_shapes(config, model, mesh), batch)
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


def test_the_step_of_a_detection_plan_takes_the_batches_of_training(tmp_path, monkeypatch):
    """Apart from the number of boxes in a clip, which plans assume."""
    write_ava(tmp_path, videos=2)
    config = tiny.config(tmp_path, **FLAGS, **{"optim.loss_reduction": "per_device"})
    clips = build.videos(config, "train")
    monkeypatch.setattr(build, "ASSUMED_BOXES", clips.max_boxes)
    settings, mesh = build.settings(config, 4), sharding.make_mesh(2, 4, jax.devices())
    with jax.set_mesh(mesh):
        batch = next(iter(build.batches(config, settings, clips, mesh, 1)))
        shapes = build.batch_shapes(config, settings.model.config, mesh)
        assert_same_shapes(shapes, sharding.to_devices(batch, mesh))
        settings = build.with_loss_reduction(config, settings, mesh)
        program = build.program(config, settings, mesh)
        rate = jax.ShapeDtypeStruct((), np.float32)
        _, metrics = program.step.lower(program.state, shapes, rate).out_info
        assert metrics["loss"][0].shape == ()


def assert_same_shapes(abstract, real) -> None:
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    for shape, array in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert shape.sharding.is_equivalent_to(array.sharding, np.ndim(array))


def test_other_learning_rates_lower_to_the_same_step():
    def lowered(**changes):
        config = tiny.config("", **{"data.stride": 1, **changes})
        settings, mesh = build.settings(config, 5), sharding.make_mesh()
        with jax.set_mesh(mesh):
            program = build.program(config, settings, mesh)
            batch = build.batch_shapes(config, settings.model.config, mesh)
            rate = jax.ShapeDtypeStruct((), np.float32)
            return program.step.lower(program.state, batch, rate).as_text()

    step = lowered()
    assert step == lowered(**{"optim.lr": 0.5, "optim.warmup_epochs": 0.0, "epochs": 7.0})
    assert step != lowered(**{"optim.weight_decay": 0.5})
