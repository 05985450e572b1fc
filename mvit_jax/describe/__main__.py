"""Tables of architectures and their cost beside published figures, and generated config files.

    python -m mvit_jax.describe mvit_b_16x4
    python -m mvit_jax.describe mvit_b_16x4 frames=8 size=160 pool_mode=max
    python -m mvit_jax.describe --all          all variants beside their published figures
    python -m mvit_jax.describe --ablations    the papers' ablations, as overrides
    python -m mvit_jax.describe --config=configs/kinetics.py:mvit_b_16x4 > configs/mine.py

The last command writes an experiment as a config file with every key, to copy and change.

Costs are in multiply-adds, which the papers call FLOPs. XLA counts two FLOPs per multiply-add.
"""

from absl import flags
from ml_collections import config_flags

from mvit_jax.common import errors
from mvit_jax.common.text import table
from mvit_jax.config import check, define_flag
from mvit_jax.describe import config_file
from mvit_jax.describe.ablations import ABLATIONS
from mvit_jax.models.cost import Cost, cost
from mvit_jax.models.summary import Row, describe
from mvit_jax.models.variants import CLASSES, PUBLISHED, VARIANTS, Published, override, variant

_CONFIG = define_flag()
_ALL = flags.DEFINE_bool("all", False, "Print all variants beside their published figures.")
_ABLATIONS = flags.DEFINE_bool(
    "ablations", False, "Print the papers' ablations beside their published figures."
)


def main(argv: list[str]) -> None:
    if _CONFIG.value is not None:
        errors.lock(_CONFIG.value)
        check(_CONFIG.value)
        source = config_flags.get_config_filename(flags.FLAGS["config"])
        print(config_file.text(_CONFIG.value, source), end="")
    elif _ALL.value:
        print(all_variants())
    elif _ABLATIONS.value:
        print(all_ablations())
    elif len(argv) < 2:
        raise errors.UserError(f"name a variant: {', '.join(VARIANTS)}; or add --all")
    else:
        overrides = dict(override(text) for text in argv[2:])
        print(describe(argv[1], variant(argv[1], **overrides)))


_PUBLISHED_HEADER = (
    "parameters", "published", "difference", "mult-adds", "published", "difference", "top-1",
    "data", "source",
)  # fmt: skip


def all_variants() -> str:
    """Returns a table of all variants and their published figures, with notes on differences."""
    rows, notes = [], []
    for name in VARIANTS:
        p = PUBLISHED.get(name)
        classes = {"num_classes": CLASSES[p.data]} if p else {}
        rows.append((name, *_compare(cost(variant(name, **classes)), p, notes)))
    return _with_notes(table(("variant", *_PUBLISHED_HEADER), rows), notes)


def all_ablations() -> str:
    """Returns a table of the papers' ablations, with the overrides that reproduce them."""
    rows, notes = [], []
    for a in ABLATIONS:
        classes = CLASSES[a.published.data]
        ours = cost(variant(a.variant, num_classes=classes, **a.overrides))
        overrides = " ".join(
            f"{k}='{v}'" if " " in str(v) and isinstance(v, str) else f"{k}={v}".replace(" ", "")
            for k, v in a.overrides.items()
        )
        rows.append((a.setting, *_compare(ours, a.published, notes), f"{a.variant} {overrides}"))
    header = ("setting", *_PUBLISHED_HEADER, "made by")
    return _with_notes(table(header, rows), notes)


def _compare(ours: Cost, p: Published | None, notes: list[str]) -> Row:
    """Returns computed and published figures; appends the reason for a difference to `notes`."""
    millions, billions = ours.parameters / 1e6, ours.multiply_adds / 1e9
    if p is None:
        return (f"{ours.parameters:,}", "", "", f"{billions:.2f}G", "", "", "", "", "")
    if p.note and p.note not in notes:
        notes.append(p.note)
    mark = f" [{notes.index(p.note) + 1}]" if p.note else ""
    return (
        f"{ours.parameters:,}", _figure(p.parameters, "M"), _percent(millions, p.parameters),
        f"{billions:.2f}G", _figure(p.multiply_adds, "G"), _percent(billions, p.multiply_adds),
        "" if p.top1 is None else f"{p.top1}%", p.data, p.source + mark,
    )  # fmt: skip


def _with_notes(text: str, notes: list[str]) -> str:
    return "\n".join([text, "", *(f"[{i}] {note}" for i, note in enumerate(notes, 1))])


def _figure(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value}{unit}"


def _percent(ours: float, published: float | None) -> str:
    return "" if published is None else f"{100 * (ours / published - 1):+.2f}%"


if __name__ == "__main__":
    errors.run(main)
