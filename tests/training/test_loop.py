"""Validations of a run that is stopped, killed or cannot write its workdir."""

import os
import signal

import pytest

from mvit_jax import train
from mvit_jax.common.errors import UserError
from mvit_jax.training import loop
from mvit_jax.training.run import history, workdir
from mvit_jax.training.run.checkpoints import Checkpoints
from tests.support import group, tiny

pytestmark = pytest.mark.slow
# Nine steps, validated after 3, 6 and 9.
RECIPE = tiny.RECIPE | {"checkpoint.every": 100}


def validated(folder):
    return [(line["step"], line["top1"], line["top5"]) for line in history.read(folder).val]


@pytest.mark.parametrize("at", [3, 9])
def test_a_stop_before_a_validation_saves_and_validates_on_resume(
    at, reference, digits, tmp_path, monkeypatch
):
    """At the last step the run completes, unless it is killed during the validation."""
    steps = iter(range(1, 10))

    def stop(*args):
        if next(steps) == at:
            os.kill(os.getpid(), signal.SIGTERM)

    validate = train.validate

    def killed(*args, **options):
        if Checkpoints(tmp_path).step() == 9:  # the last step is saved
            raise SystemExit(9)
        return validate(*args, **options)

    config = tiny.config(digits, **RECIPE)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "report_broken", stop)
        if at == 9:
            patch.setattr(train, "validate", killed)
            with pytest.raises(SystemExit):
                train.train(config, str(tmp_path))
        else:
            assert train.train(config, str(tmp_path)) == 128 + signal.SIGTERM
    assert Checkpoints(tmp_path).step() == at
    assert [step for step, *_ in validated(tmp_path)] == [3, 6, 9][: at // 3 - 1]
    assert train.train(config, str(tmp_path)) == 0
    assert validated(tmp_path) == validated(reference)
    ours, theirs = Checkpoints(tmp_path), Checkpoints(reference)
    assert (ours.step("best"), ours.best_top1) == (theirs.step("best"), theirs.best_top1)
    group.assert_same_state(tmp_path, reference)


def test_training_continues_if_a_validation_cannot_be_recorded(
    digits, tmp_path, monkeypatch, capsys
):
    """The best checkpoint is saved; the next start may validate again."""
    write_atomically = workdir.write_atomically

    def full(path, content):
        if path.name == "validated.txt":
            raise UserError(f"{path} cannot be written (No space left on device)")
        write_atomically(path, content)

    monkeypatch.setattr(workdir, "write_atomically", full)
    assert train.train(tiny.config(digits, **RECIPE), str(tmp_path)) == 0
    assert capsys.readouterr().out.count("device): the next start may validate step") == 3
    assert [step for step, *_ in validated(tmp_path)] == [3, 6, 9]
