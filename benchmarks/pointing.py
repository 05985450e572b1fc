"""Map benchmark: which maps depend on the video, and which of them point at the moving digit.

    python -m benchmarks.pointing runs/moving_digits     (a run of `make train`; a minute)

Each row is a kind of map, over 48 clips of digits that training has not seen:

- correlation: of the maps of two clips, mean over all pairs. 1 means one map for every clip.
- on digit: the share of clips whose map has its maximum on the clip's digit (the pointing game,
  Zhang et al. 2018). The digit includes 4 pixels around it, half the side of a token.
- on other's: the same on the digit of another clip, which a map of the digits' usual position
  reaches. The digits' share of all pixels is printed above the table.
- ratio: the map's share on the digit, divided by a uniform map's share; mean over clips, and the
  share of clips with a ratio above 2.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mvit_jax.analysis import attention_maps, token_geometry
from mvit_jax.data.making import moving_digits
from mvit_jax.models.functional import Functional
from mvit_jax.models.mvit import PooledAttention
from mvit_jax.models.ops.attention import join_heads, split_heads
from mvit_jax.models.plan import grids, plan
from mvit_jax.training import run_folder

Maps = Float[np.ndarray, "clips time height width"]
Masks = Bool[np.ndarray, "clips time height width"]


def scenes(count: int) -> tuple[jax.Array, Masks]:
    """Returns normalised clips `[count, 8, 64, 64, 3]`, and masks of digits (plus 4 pixels)."""
    digits, rng = moving_digits.handwriting(seed=0)["test"], np.random.default_rng(0)
    clips, masks = [], []
    for i in range(count):
        scene = moving_digits.draw(i % 8, digits, rng)
        frames = moving_digits.render(scene)
        bare = dataclasses.replace(
            scene, background=0 * scene.background, noise=0 * scene.noise, brightness=255.0
        )
        sampled = np.linspace((len(frames) - 32) // 2, (len(frames) - 32) // 2 + 31, 8).astype(int)
        clips.append(np.repeat(frames[sampled][..., None], 3, axis=-1))
        masks.append(dilate(moving_digits.render(bare)[sampled] > 64))
    clips = (np.stack(clips) / np.float32(255) - np.float32(0.45)) / np.float32(0.225)
    return jnp.asarray(clips), np.stack(masks)


def dilate(mask: np.ndarray, pixels: int = 4) -> np.ndarray:
    """Dilates a mask by `pixels`; the default is half the side of a token."""
    side = np.arange(-pixels, pixels + 1)
    return np.any([np.roll(mask, (y, x), (1, 2)) for y in side for x in side], axis=0)


def ratios(heat: Maps, masks: Masks) -> np.ndarray:
    """Returns, per clip, the share of `heat` inside the mask, divided by a uniform map's share.

    The ratio of an empty map is 0.
    """
    share = (heat * masks).sum((1, 2, 3)) / np.maximum(heat.sum((1, 2, 3)), 1e-12)
    return share / masks.mean((1, 2, 3))


def correlation(heat: Maps) -> float:
    """Returns the mean Pearson correlation of the maps of two clips, over all pairs of clips.

    Clips with an empty map are left out.
    """
    maps = heat.reshape(len(heat), -1)
    pairs = np.corrcoef(maps[np.ptp(maps, axis=1) > 0])
    return float(pairs[np.triu_indices(len(pairs), 1)].mean())


def hits(heat: Maps, masks: Masks) -> tuple[float, float]:
    """Returns the shares of maps with their maximum on their own and on another clip's digit."""
    at = heat.reshape(len(heat), -1).argmax(1)
    on = masks.reshape(len(heat), -1)[:, at]  # [clip of the digit, clip of the map]
    same = np.eye(len(heat), dtype=bool)
    return float(on[same].mean()), float(on[~same].mean())


class _Attention(PooledAttention):
    """The built-in attention, with `record["summand"]` added to the probabilities."""

    def attend(self, q, k, v, *, query_grid, key_grid, relative=None, record=None):
        assert record is not None
        super().attend(
            q, k, v, query_grid=query_grid, key_grid=key_grid, relative=relative, record=record
        )
        probabilities = record["attention"] + record["summand"]
        v = split_heads(v, self.plan.heads)
        return join_heads(jnp.einsum("bhqk,bkhd->bqhd", probabilities, v))


def class_rollout(model: Functional, params: Any, clip: Array) -> Array:
    """Computes the rollout of the most probable class (Chefer et al. 2021, arXiv 2103.15679).

    As `attention_maps.rollout`, but a block's attention is multiplied by the gradient of the
    class's logit, clipped at 0 and averaged over heads; skip connections have weight 1.
    """
    model = dataclasses.replace(model, attention=_Attention)
    config, module = model.config, model.module(params)
    blocks, rows = plan(config), grids(config, *clip.shape[1:4])

    def score(summands: list[Array]) -> tuple[Array, list[Array]]:
        x, _ = module.embed(clip)
        records = [{"summand": summand} for summand in summands]
        for layer, row, record in zip(module.blocks, rows, records, strict=True):
            x = layer(x, row.input, record=record)
        return module.classify(x)[0].max(-1).sum(), [r["attention"] for r in records]

    first, batch = int(config.class_token), len(clip)
    zeros = [
        jnp.zeros((batch, b.heads, first + math.prod(r.output), first + math.prod(r.keys)))
        for b, r in zip(blocks, rows, strict=True)
    ]
    gradients, attentions = jax.grad(score, has_aux=True)(zeros)
    flow = attention_maps._start(config, rows[-1].output, None, batch)
    for b, row, a, g in reversed(list(zip(blocks, rows, attentions, gradients, strict=True))):
        by_key = jnp.einsum("bq,bhqk->bk", flow, jax.nn.relu(a * g)) / b.heads
        attended = attention_maps._unpool(by_key, token_geometry.windows(b.kv_pool, row.input))
        skip = attention_maps._unpool(flow, token_geometry.windows(b.skip_pool, row.input))
        flow = attended + skip
    return flow[:, first:].reshape(batch, *rows[0].input)


def kinds(model: Functional, params: Any, clips: Array) -> Iterator[tuple[str, Maps]]:
    """Yields names and maps, interpolated to the clips' pixels."""

    def compute(function: Any, block: int = 0) -> Maps:
        program = jax.jit(functools.partial(function, model))
        maps = np.asarray(program(params, clips))
        _, time, height, width, _ = clips.shape
        return token_geometry.to_pixels(maps, (time, height, width), model.config, block)

    rollout = compute(attention_maps.rollout)
    yield "rollout", rollout
    yield "rollout - its mean over clips", np.maximum(rollout - rollout.mean(0), 0)
    yield "rollout / its mean over clips", rollout / rollout.mean(0)
    yield "rollout of the class", compute(class_rollout)
    for block in (0, 1, 3):
        for by_channel in (False, True):
            cam = functools.partial(attention_maps.grad_cam, block=block, by_channel=by_channel)
            form = "by channel" if by_channel else "by position"
            yield f"Grad-CAM, block {block}, {form}", compute(cam, block)


def main(workdir: str) -> None:
    params, model = run_folder.read_params(Path(workdir))
    clips, masks = scenes(48)
    print(f"share of pixels on the digit: {masks.mean():.0%}\n")
    print(f"{'map':33} correlation  on digit  on other's  ratio  above 2")
    for name, heat in kinds(model, params, clips):
        hit, hit_other = hits(heat, masks)
        ratio = ratios(heat, masks)
        print(
            f"{name:33} {correlation(heat):11.2f}  {hit:8.0%}  {hit_other:10.0%}  "
            f"{ratio.mean():5.2f}  {(ratio > 2).mean():7.0%}"
        )


if __name__ == "__main__":
    main(sys.argv[1])
