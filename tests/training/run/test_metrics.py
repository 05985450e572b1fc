"""What a run tells, where it cannot be written."""

import jax.numpy as jnp

from mvit_jax.training.run.metrics import Logbook
from tests.training.run.test_checkpoints import files_of_at_most

STEPS = 60


def test_on_a_full_disk_the_events_and_the_history_end_and_training_goes_on(tmp_path, capsys):
    one, none = jnp.ones(()), jnp.zeros(())
    metrics = dict.fromkeys(("loss", "accuracy", "gradient_norm"), (one, one))
    log = Logbook(tmp_path, start=0, steps=STEPS, batch=8, every=1)
    with files_of_at_most(3000):
        for step in range(1, STEPS + 1):
            log.step(step, metrics | {"broken": (none, one)}, 0.1)
            if step % 10 == 0:
                log.validation(step, {"top1": 50.0})
        log.close()
    said = capsys.readouterr().out
    assert f"step {STEPS}/{STEPS}  loss 1.000" in said and f"step {STEPS}/{STEPS}  valid" in said
    assert (
        said.count("the TensorBoard events of this run end here: they cannot be written (File") == 1
    )
    assert said.count("the history of this run ends here: it cannot be written (File too la") == 1
