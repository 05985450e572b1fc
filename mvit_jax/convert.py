"""Conversion of checkpoints from and to PySlowFast, torchvision, PyTorchVideo and timm.

    python -m mvit_jax.convert SOURCE --variant=mvit_b_16x4 --out=DIR
    python -m mvit_jax.convert SOURCE --variant=mvitv2_s_16x4 --out=DIR --inflate=centre
    python -m mvit_jax.convert SOURCE --variant=mvit_b_16x4 --out=DIR num_classes=10 frames=32
    python -m mvit_jax.convert SOURCE --variant=mvit_b_16x4 --out=DIR task=detection
    python -m mvit_jax.convert DIR --to=torchvision --out=FILE
    python -m mvit_jax.convert DIR --to=stablehlo --out=FILE [--platforms=cpu,cuda,tpu] [--batch=N]

SOURCE is a .pyth, .pth, .pt or safetensors file; pickles are read without executing them. The
program writes DIR, which `evaluate`, `predict` and `--config.init.checkpoint` read. DIR holds the
parameters, architecture, preprocessing, report.txt with a line per tensor, and with --labels also
labels.txt. If a tensor does not fit the model, the program ends with an error and writes nothing.

A checkpoint of action detection has the tensor names of a classifier. With task=detection, DIR is a
detection model, whose config names AVA's files as in configs/ava.py.

If SOURCE has plain and averaged weights (EMA), the averaged ones are read; --weights=plain reads
the others, and report.txt has a note.

With --to, DIR may also be the workdir of a run; --weights selects its weights, too. --to=stablehlo
writes the whole model, which JAX runs without this package. The model's input is uint8 clips
[batch, T, H, W, 3], or images [batch, H, W, 3], with RGB from 0 to 255, resized and cropped to the
model's size. The model normalises its input, computes in the run's dtype and precision, and returns
float32 logits [batch, classes].
"""

import dataclasses
import json
import shutil
import tempfile
from contextlib import closing
from pathlib import Path

import jax
from absl import flags

from mvit_jax.common import errors
from mvit_jax.common.files import AnyPath, local_path, to_path, write_atomically
from mvit_jax.common.text import first_line
from mvit_jax.config import RECIPES, Config, base
from mvit_jax.config import load as load_config
from mvit_jax.data.formats.ava_tables import read_class_list
from mvit_jax.data.formats.video_list import read_class_names
from mvit_jax.models.plan import MViTConfig
from mvit_jax.models.variants import override, preprocessing
from mvit_jax.training import build
from mvit_jax.training.run import workdir
from mvit_jax.training.run.checkpoints import Checkpoints
from mvit_jax.training.run_folder import RunFolder
from mvit_jax.weights.adapt import INFLATIONS
from mvit_jax.weights.export import TARGETS, save_torch
from mvit_jax.weights.key_tables import Origin
from mvit_jax.weights.load import Loaded, load
from mvit_jax.weights.report import WeightsError
from mvit_jax.weights.stablehlo import save_stablehlo
from mvit_jax.weights.state_dicts import WEIGHTS

_VARIANT = flags.DEFINE_string("variant", None, "Variant of SOURCE; `describe --all` lists them.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; with --to, the file to write.")
_TO = flags.DEFINE_enum(
    "to", None, (*TARGETS, "stablehlo"), "Format to export a run or a converted folder to."
)
_LABELS = flags.DEFINE_string(
    "labels", None, "Class names, one per line, label 0 first; or AVA's .pbtxt."
)
_INFLATE = flags.DEFINE_enum(
    "inflate", None, INFLATIONS, "Conversion of an image model's kernels to a video model, or back."
)
_WHICH = flags.DEFINE_enum(
    "which",
    "last",
    ["last", "best"],
    "With --to: the checkpoint of a run.",
    allow_override=True,
)
_WEIGHTS = flags.DEFINE_enum(
    "weights",
    None,
    WEIGHTS,
    "Plain or averaged (ema) weights; by default averaged ones if SOURCE or the run has any.",
    allow_override=True,
)
_PLATFORMS = flags.DEFINE_list(
    "platforms",
    None,
    "With --to=stablehlo: any of cpu, cuda, rocm, tpu; by default that of this machine.",
)
_BATCH = flags.DEFINE_integer(
    "batch",
    None,
    "With --to=stablehlo: a fixed batch size; by default any.",
    lower_bound=1,
    allow_override=True,
)

ORIGIN = "origin.json"


def main(argv: list[str]) -> None:
    if len(argv) < 2 or not _OUT.value:
        raise errors.UserError(
            "SOURCE or --out is missing: give SOURCE --variant=NAME --out=DIR to import weights, "
            "or SOURCE --to=FORMAT --out=FILE to export them"
        )
    source, overrides = argv[1], dict(override(text) for text in argv[2:])
    out = local_path(_OUT.value)
    if _TO.value != "stablehlo" and (_PLATFORMS.value or _BATCH.value):
        raise errors.UserError("--platforms and --batch require --to=stablehlo")
    if _TO.value is not None:
        if overrides or _VARIANT.value or _LABELS.value or _INFLATE.value:
            raise errors.UserError(
                "--to exports a folder unchanged: leave out --variant, --labels, --inflate and "
                "field=value"
            )
        if out.exists():
            raise errors.UserError(f"{out} already exists: choose another --out, or move it away")
        if _TO.value == "stablehlo":
            options = _BATCH.value, _PLATFORMS.value, _WEIGHTS.value
            export_program(to_path(source), out, _WHICH.value, *options)
        else:
            export_checkpoint(to_path(source), out, _TO.value, _WHICH.value, _WEIGHTS.value)
        return
    if _WHICH.value != "last":
        raise errors.UserError("--which=best requires --to: without it, SOURCE is a file")
    if _VARIANT.value is None:
        raise errors.UserError(
            "name the variant of SOURCE: --variant=NAME (`describe --all` lists them)"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise errors.UserError(f"{out} already exists: choose another --out, or move it away")
    labels = None if _LABELS.value is None else _read_names(_LABELS.value)
    import_checkpoint(
        source, _VARIANT.value, out, labels, _INFLATE.value, _WEIGHTS.value, **overrides
    )


def import_checkpoint(
    source: str,
    variant: str,
    out: str | Path,
    labels: tuple[str, ...] | None,
    inflate,
    weights: str | None = None,
    **overrides,
) -> None:
    """Converts a checkpoint of another project to the folder `out`, atomically."""
    try:
        loaded = load(source, variant, inflate=inflate, weights=weights, **overrides)
    except WeightsError as error:
        print(error.report)  # lists every tensor; the error has only the problems
        raise
    if labels is not None and len(labels) != loaded.config.num_classes:
        raise errors.UserError(
            f"--labels names {len(labels)} classes, but the model has "
            f"{loaded.config.num_classes}: give the list of its classes"
        )
    out = Path(out)
    workdir.make(out.parent)
    needed = sum(values.nbytes for values in jax.tree.leaves(loaded.params))
    free = shutil.disk_usage(out.parent).free
    if free < 1.1 * needed:
        raise errors.UserError(
            f"{out} cannot be written: it needs {needed / 1e6:.0f} MB, but only "
            f"{free / 1e6:.0f} MB are free"
        )
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True
        ) as building:
            _write(Path(building), loaded, variant, labels)
            Path(building).chmod(0o755)
            if out.exists():
                out.rmdir()  # it is empty
            Path(building).replace(out)
    except errors.UserError:
        raise
    except Exception as error:  # Orbax raises its own classes, such as for a full disk
        reason = getattr(error, "strerror", None) or first_line(error)
        raise errors.UserError(f"{out} cannot be written ({reason})") from None
    print(loaded.report.summary())
    print(f"wrote {out}; its report.txt has a line per tensor")


def _write(folder: Path, loaded: Loaded, variant: str, labels: tuple[str, ...] | None) -> None:
    detects = loaded.config.task == "detection"
    config = _detection_config(loaded.config) if detects else base()
    config.model.update(build.model_fields(variant, loaded.config))
    expected = preprocessing(variant, frames=loaded.config.frames, size=loaded.config.size)
    for field in ("stride", "mean", "std", "interpolation"):
        config.data[field] = getattr(expected, field)
    # AVA's frames are tested at the size of the crop.
    config.data.short_side = expected.size if detects else expected.short_side
    if expected.frames == 1:
        config.eval.clips = 1  # all clips of an image are equal
    workdir.record_config(config, folder)
    write_atomically(folder / ORIGIN, json.dumps(dataclasses.asdict(loaded.origin)) + "\n")
    write_atomically(folder / "report.txt", f"{loaded.report}\n")
    if labels is not None:
        write_atomically(folder / "labels.txt", "\n".join(labels) + "\n")
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save_params(loaded.params)


def _detection_config(model: MViTConfig) -> Config:
    """Returns the defaults with data, augmentation and test of configs/ava.py."""
    config, recipe = base(), load_config(str(RECIPES / "ava.py"))
    for section in ("data", "augment", "eval"):
        config[section].update(recipe[section].to_dict())
    config.data.classes = model.num_classes
    return config


def _read_names(path: str) -> tuple[str, ...]:
    """Reads class names, one per line or from AVA's list (.pbtxt)."""
    if path.endswith(".pbtxt"):
        return read_class_list(local_path(path)).all_names()
    return read_class_names(local_path(path))


def export_checkpoint(
    folder: str | AnyPath, out: Path, to: str, which: str, weights: str | None = None
) -> None:
    """Exports the weights of a run or a converted folder to another project's format."""
    with RunFolder(folder, weights=weights) as run:
        params, model = run.params(which), run.settings(which).model
    if model.is_custom:
        raise errors.UserError(
            f"{folder} has custom modules, which no other project's format can hold: use "
            "--to=stablehlo, or the folder itself"
        )
    exported = save_torch(params, model.config, out, to, origin=_origin(folder))
    print(f"wrote {out}: {exported.tensors} tensors in the format of {exported.format}")
    for note in exported.notes:
        print(f"note: {note}")


def export_program(
    folder: str | AnyPath,
    out: Path,
    which: str,
    batch: int | None,
    platforms: list[str] | None,
    weights: str | None = None,
) -> None:
    """Exports the model of a run or a converted folder to a StableHLO file."""
    with RunFolder(folder, weights=weights) as run:
        params, config, settings = run.params(which), run.config, run.settings(which)
    if settings.model.config.task == "detection":
        raise errors.UserError(
            f"{folder} classifies boxes, which --to=stablehlo does not support: use the folder"
        )
    mean, std = settings.step.mean, settings.step.std
    with jax.default_matmul_precision(config.precision):
        exported = save_stablehlo(
            settings.model, params, out, mean=mean, std=std, batch=batch, platforms=platforms
        )
    [clips], [logits] = exported.in_avals, exported.out_avals
    print(
        f"wrote {out} for {', '.join(exported.platforms)}: "
        f"{clips.str_short()}, RGB from 0 to 255, to logits {logits.str_short()}"
    )


def _origin(folder: str | AnyPath) -> Origin | None:
    path = to_path(folder) / ORIGIN
    if not path.exists():
        return None
    fields = workdir.read(path)
    if "family" in fields:  # the name of `format` in folders that an earlier version wrote
        fields["format"] = fields.pop("family")
    return Origin(**fields)


if __name__ == "__main__":
    errors.run(main)
