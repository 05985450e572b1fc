"""Throughput and memory of whole models, compared with their PyTorch originals.

    python -m benchmarks.model                               the variants of the README
    python -m benchmarks.model --models=mvit_b_16x4 --batch=4 --json=model.json

"forward" is an evaluation's forward pass, without saved activations. "train step" is the loss and
the gradients of all parameters, with dropout and drop path, without the optimiser's update. Both
sides compute in float32, with one thread per available core. PyTorch runs eagerly.

Each side has its own process, which is warmed up. The sides alternate in every round, as machines
are shared: compare the ratios (ours / PyTorch) of medians. Compile time is XLA's, with tracing and
without the compilation cache. Peak memory is the process's largest resident set during the rounds,
including Python and libraries. Our side reuses freed memory, as training does; PyTorch has its
default settings. Without torch, torchvision or timm (extra `parity`), only our side runs.

MViT-B for images has no original in either library. Its stand-in is torchvision's class with the
same sizes and one frame. The stand-in adds two positional embeddings where our model has one.
"""

import importlib.util
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import machine
from mvit_jax.common.files import write_atomically
from mvit_jax.models.functional import functional
from mvit_jax.models.plan import MViTConfig, plan
from mvit_jax.models.variants import variant
from mvit_jax.training.run.runtime import release_freed_memory
from mvit_jax.training.step import cross_entropy

# The original model's library and the batch sizes, for each variant.
CASES = {
    "mvit_b_16x4": ("torchvision", (1, 4)),
    "mvitv2_s_16x4": ("torchvision", (1, 4)),
    "mvit_b16": ("torchvision", (8,)),
    "mvitv2_t": ("timm", (8,)),
}
ORIGINALS = {"mvit_b_16x4": "mvit_v1_b", "mvitv2_s_16x4": "mvit_v2_s", "mvitv2_t": "mvitv2_tiny"}
PARTS = ("forward", "train step")

_MODELS = flags.DEFINE_list("models", list(CASES), f"Any of {', '.join(CASES)}.")
_BATCH = flags.DEFINE_list("batch", None, "Batch sizes; by default those of each variant.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File for the results as JSON.")
_SIDE = flags.DEFINE_enum(
    "side", None, ["ours", "PyTorch"], "Run one side of one case (for internal use)."
)


def main(argv: list[str]) -> None:
    unknown = set(_MODELS.value) - set(CASES)
    if unknown:
        raise app.UsageError(f"--models must be of {', '.join(CASES)}, not {', '.join(unknown)}")
    batches = _BATCH.value or []
    if not all(re.fullmatch("[1-9][0-9]*", batch) for batch in batches):
        raise app.UsageError(f"--batch must be numbers like 1,4, not {','.join(batches)}")
    jax.config.update("jax_enable_compilation_cache", False)
    cases = [
        (name, int(batch))
        for name in _MODELS.value
        for batch in (_BATCH.value or CASES[name][1])
    ]  # fmt: skip
    if _SIDE.value:
        serve(*cases[0], _SIDE.value)
        return
    about = machine.about()
    print(f"{about['machine']}, float32, {about['date']}: {about['versions']}\n")
    print(
        "| variant, batch | | ours, ms | PyTorch, ms | ours / PyTorch | compile, s |\n|"
        + " --- |" * 6,
        flush=True,
    )
    rows = []
    for name, batch in cases:
        row = measure(name, batch, _ROUNDS.value)
        rows.append(row)
        print(as_table(row), flush=True)
        if _JSON.value:
            write_atomically(Path(_JSON.value), json.dumps(about | {"rows": rows}, indent=1) + "\n")


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Returns the milliseconds of all rounds and peak MiB of each side, and our compile seconds."""
    names = ["ours", "PyTorch"] if has_original(name) else ["ours"]
    sides = {side: Side(name, batch, side) for side in names}
    times: dict[str, dict[str, list[float]]] = {p: {s: [] for s in sides} for p in PARTS}
    for _ in range(rounds):
        for part in PARTS:
            for side in sides:
                times[part][side].append(sides[side].request(part))
    memory = {side: sides[side].request("peak") for side in sides}
    for side in sides.values():
        side.end()
    return {
        "variant": name,
        "batch": batch,
        "milliseconds": times,
        "compile_seconds": sides["ours"].ready,
        "peak_mebibytes": memory,
    }


class Side:
    """A subprocess with one side of one case, compiled and warmed up."""

    def __init__(self, name: str, batch: int, side: str) -> None:
        flags = [f"--models={name}", f"--batch={batch}", f"--side={side}"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.model", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready = self._answer()

    def request(self, command: str) -> Any:
        """Sends a command to the subprocess and returns the answer."""
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        return self._answer()

    def end(self) -> None:
        self.process.communicate()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a process of the comparison has failed: see its error above")
        return json.loads(line)


def serve(name: str, batch: int, side: str) -> None:
    """Prints the compile seconds after warm-up, then answers commands from stdin, one a line.

    A part's name is answered with the milliseconds of a run, "peak" with peak MiB since warm-up.
    """
    seconds: dict[str, float] = {}
    if side == "ours":
        machine.use_training_settings()
    runs = ours(name, batch, seconds) if side == "ours" else original(name, batch)
    for run in runs.values():
        run()
    release_freed_memory()
    reset_peak()
    print(json.dumps(seconds), flush=True)
    for line in map(str.strip, sys.stdin):
        if line == "peak":
            print(peak(), flush=True)
            continue
        began = time.perf_counter()
        runs[line]()
        print(1000 * (time.perf_counter() - began), flush=True)


def as_table(row: dict[str, Any]) -> str:
    lines = []
    compared = "PyTorch" in row["peak_mebibytes"]
    for part in PARTS:
        ms = {side: float(np.median(t)) for side, t in row["milliseconds"][part].items()}
        theirs = f"{ms['PyTorch']:.0f} | {ms['ours'] / ms['PyTorch']:.2f}" if compared else " | "
        seconds = row["compile_seconds"][part]
        cells = f"{row['variant']}, {row['batch']} | {part} | {ms['ours']:.0f} | {theirs}"
        lines.append(f"| {cells} | {seconds:.1f} |")
    peak = row["peak_mebibytes"]
    theirs = f"{peak['PyTorch']:.0f} | {peak['ours'] / peak['PyTorch']:.2f}" if compared else " | "
    cells = f"{row['variant']}, {row['batch']} | peak memory, MiB | {peak['ours']:.0f} | {theirs}"
    return "\n".join([*lines, f"| {cells} | |"])


def ours(name: str, batch: int, compile_seconds: dict[str, float]) -> dict[str, Callable[[], Any]]:
    """Returns the compiled forward pass and train step."""
    config = variant(name)
    model = functional(config)
    params = jax.jit(model.init)(jax.random.key(0))
    clip, labels = (jnp.asarray(x) for x in example(config, batch))
    key = jax.random.key(1)

    def loss(params, clip, labels, key):
        logits, _ = model.apply(params, clip, key=key)
        return cross_entropy(logits, jax.nn.one_hot(labels, config.num_classes)).mean()

    functions = {
        "forward": (lambda params, clip: model.apply(params, clip)[0], params, clip),
        "train step": (jax.value_and_grad(loss), params, clip, labels, key),
    }
    runs = {}
    for part, (function, *arguments) in functions.items():
        began = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        compile_seconds[part] = time.perf_counter() - began
        runs[part] = lambda compiled=compiled, arguments=arguments: jax.block_until_ready(
            compiled(*arguments)
        )
    return runs


def original(name: str, batch: int) -> dict[str, Callable[[], Any]]:
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(machine.cores())
    torch.manual_seed(0)
    config = variant(name)
    model = _original(name, config)
    clip, labels = example(config, batch)
    if config.frames == 1 and CASES[name][0] == "torchvision":
        clip = clip[:, None]
    clip = torch.from_numpy(np.ascontiguousarray(np.moveaxis(clip, -1, 1)))
    labels = torch.from_numpy(labels)

    def forward():
        model.eval()
        with torch.inference_mode():
            model(clip)

    def train_step():
        model.train()
        model.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(clip), labels).backward()

    return {"forward": forward, "train step": train_step}


def _original(name: str, config: MViTConfig) -> Any:
    if CASES[name][0] == "timm":
        import timm  # pyright: ignore[reportMissingImports]

        return timm.create_model(ORIGINALS[name], drop_path_rate=config.drop_path)
    from torchvision.models import video  # pyright: ignore[reportMissingImports]

    if name in ORIGINALS:
        return getattr(video, ORIGINALS[name])()
    import torchvision.models.video.mvit as classes  # pyright: ignore[reportMissingImports]

    blocks = [
        classes.MSBlockConfig(
            block.heads,
            block.width,
            block.width_out,
            list(block.q_pool.kernel) if block.q_pool else [],
            list(block.kv_pool.kernel) if block.kv_pool else [],
            list(block.q_pool.stride) if block.q_pool else [],
            list(block.kv_pool.stride) if block.kv_pool else [],
        )
        for block in plan(config)
    ]
    return classes.MViT(
        spatial_size=(config.size, config.size),
        temporal_size=config.frames,
        block_setting=blocks,
        residual_pool=False,
        residual_with_cls_embed=False,
        rel_pos_embed=False,
        proj_after_attn=False,
        dropout=config.dropout,
        stochastic_depth_prob=config.drop_path,
        num_classes=config.num_classes,
        patch_embed_kernel=config.patch_kernel,
        patch_embed_stride=config.patch_stride,
        patch_embed_padding=config.patch_padding,
    )


def example(config: MViTConfig, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns random clips `[batch, T, H, W, 3]` (images without T) and labels `[batch]`."""
    rng = np.random.default_rng(0)
    frames = (config.frames,) if config.frames > 1 else ()
    shape = (batch, *frames, config.size, config.size, 3)
    return rng.standard_normal(shape, np.float32), rng.integers(0, config.num_classes, batch)


def reset_peak() -> None:
    """Resets the peak memory, to exclude compilation; has no effect outside of Linux."""
    clear_refs = Path("/proc/self/clear_refs")
    if clear_refs.exists():
        clear_refs.write_text("5")  # proc_pid_clear_refs(5)


def peak() -> float:
    """Returns the largest resident set of this process, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 2**10
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / 2 ** (20 if sys.platform == "darwin" else 10)


def has_original(name: str) -> bool:
    return all(importlib.util.find_spec(module) for module in ("torch", CASES[name][0]))


if __name__ == "__main__":
    app.run(main)
