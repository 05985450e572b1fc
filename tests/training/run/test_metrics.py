"""Metric logging on a full disk."""

import jax.numpy as jnp

from mvit_jax.training.run.metrics import Logbook
from tests.training.run.test_checkpoints import files_of_at_most

STEPS = 60


def test_counts_of_a_validation_are_whole_numbers(tmp_path, capsys):
    log = Logbook(tmp_path, start=0, steps=4, batch=8, every=2)
    log.validation(4, {"top1": 50.0, "videos": 12000, "seconds": 3.456})
    log.close()
    line = "step 4/4  validation: top1 50.00  videos 12,000  seconds 3.46\n"
    assert capsys.readouterr().out == line


def test_on_a_full_disk_training_continues_without_events_and_history(tmp_path, capsys):
    one, none = jnp.ones(()), jnp.zeros(())
    metrics = dict.fromkeys(("loss", "accuracy", "gradient_norm"), (one, one))
    log = Logbook(tmp_path, start=0, steps=STEPS, batch=8, every=1)
    with files_of_at_most(3000):
        for step in range(1, STEPS + 1):
            log.step(step, metrics | {"broken": (none, one)}, 0.1)
            if step % 10 == 0:
                log.validation(step, {"top1": 50.0})
        log.close()
    output = capsys.readouterr().out
    assert f"step {STEPS}/{STEPS}  loss 1.000" in output
    assert f"step {STEPS}/{STEPS}  valid" in output
    events = "the TensorBoard events of this run end here: they cannot be written (File"
    assert output.count(events) == 1
    assert output.count("the history of this run ends here: it cannot be written (File too la") == 1
