"""Motion and appearance of moving scenes: random paths of actors, their frames and boxes.

Time is cut into shots, as in a film: at a cut everything jumps to new positions. Each key frame is
near the middle of its shot, so that a clip of 30 frames around it has no cut. A shot has
parameters, such as the distance of two actors, each with a range. A driven parameter runs through
its range at constant velocity in one shot, forwards or backwards. Others are constant in the shot.
At the key frame, all have the same distribution around the middle of their range. So a key frame
alone shows neither motion nor relation, and the frames of a clip without their order show no
direction. Frames at other known times do show something: first frames of growing actors are small.
"""

import dataclasses

import cv2
import numpy as np
from jaxtyping import Float, Float32, Float64, UInt8

SIZE = (176, 128)  # px, long and short side of a frame
LENGTHS = (155, 170)  # frames, both ends included
SHOT = 30  # frames of a shot
BEFORE = 16  # frames of a shot before a key frame; clips of up to 30 frames have no cut
_JITTER = 0.15  # of all parameters at a key frame, in parts of their range in a shot

MOTIONS = ("up", "down", "sideways", "still", "growing", "shrinking", "turning")
IN_PLACE = MOTIONS[3:]

# Relations of the two partners of a scene. In the first three they move along the line between
# them, in the others across it. So a frame, which shows the line, does not show the direction.
RELATIONS = ("approaches", "leaves", "follows", "passes", "accompanies", "overtakes")

_ROOM = 128  # px, side of the central square that the partners stay in: a central crop has both
_TRAVEL = 34.0  # px, longest way in a shot
_SIDES = (20.0, 28.0)  # px for the 8 px of handwriting, geometric middle of an actor's range
_GROWTH = (1.5, 1.8)  # factor in a shot
_TURNS = (2.5, 6.0)  # degrees a frame
_CELL = 8  # px of the enlarged glyph for each px of the handwriting
_INK = 0.25  # least ink of a pixel inside a box


# eq=False, repr=False: equality and repr of arrays.
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Body:
    """A thing that moves: an actor or a distractor.

    `poses` has x and y of the centre in px from the top left corner, the angle in degrees
    clockwise, and the side in px for the 8 px of handwriting.
    """

    glyph: Float[np.ndarray, "8 8"]  # ink, 0 to 1
    colour: Float[np.ndarray, "3"]  # RGB, 0 to 255
    poses: Float64[np.ndarray, "time 4"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Picture:
    """Everything that is painted, from back to front.

    Attributes:
      width, height: size of a frame in px.
      texture: ground, larger than a frame.
      drift: position of the frame in the texture, in px.
      distractors: bodies behind the actors.
      actors: bodies with boxes.
      pillars: left and right end of each vertical bar in front of the actors, in px.
      paint: RGB of the pillars.
    """

    width: int
    height: int
    texture: Float32[np.ndarray, "rows columns 3"]
    drift: Float64[np.ndarray, "time 2"]
    distractors: tuple[Body, ...]
    actors: tuple[Body, ...]
    pillars: Float64[np.ndarray, "time pillars 2"]
    paint: Float[np.ndarray, "3"]


@dataclasses.dataclass(frozen=True)
class Role:
    """Motion of a body throughout a video: its name, and the direction of those that travel.

    The direction is (x, y), a unit vector with y pointing down; it is unused in place.
    """

    motion: str
    direction: tuple[int, int] = (1, 0)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two partners: the relation of the first to the second, and both roles.

    `mutual` is true if the second moves likewise in `approaches`, `leaves` and `passes`, and false
    if it stays in place.
    """

    relation: str
    mutual: bool
    first: Role
    second: Role


def draw_pair(relation: str, rng: np.random.Generator) -> Pair:
    """Draws directions, and the motion of a partner that stays in place."""
    direction = _DIRECTIONS[rng.integers(4)]
    first, mutual = _travel(direction), bool(rng.integers(2))
    if relation in ("follows", "accompanies", "overtakes"):
        return Pair(relation, mutual, first, first)
    opposite = _travel((-direction[0], -direction[1]))
    stays = Role(str(rng.choice(IN_PLACE)))
    return Pair(relation, mutual, first, opposite if mutual else stays)


def draw_role(rng: np.random.Generator) -> Role:
    """Draws one of all motions."""
    motion = str(rng.choice(MOTIONS))
    vertical = {"up": (0, -1), "down": (0, 1)}.get(motion)
    return Role(motion, vertical or (int(rng.choice((-1, 1))), 0))


_DIRECTIONS = ((0, -1), (0, 1), (-1, 0), (1, 0))


def _travel(direction: tuple[int, int]) -> Role:
    return Role({(0, -1): "up", (0, 1): "down"}.get(direction, "sideways"), direction)


def draw_shots(length: int, rng: np.random.Generator) -> list[Float64[np.ndarray, " time"]]:
    """Draws the phases of the frames of each shot of a video, 0 to 1 but for the jitter."""
    shots = []
    first = -BEFORE  # a key frame is the middle of every shot: all are at multiples of `SHOT`
    for start in range(first, length, SHOT):
        phases = (np.arange(SHOT) - BEFORE) / SHOT + _value(rng)
        shots.append(phases[max(-start, 0) : length - start])
    return [shot for shot in shots if len(shot)]


def _value(rng: np.random.Generator) -> float:
    return 0.5 + rng.uniform(-_JITTER, _JITTER)


def draw_poses(
    pair: Pair | None,
    extras: list[Role],
    distractors: list[Role],
    phase: Float64[np.ndarray, " time"],
    size: tuple[int, int],
    rng: np.random.Generator,
) -> list[Float64[np.ndarray, "time 4"]]:
    """Draws the poses in a shot of the partners, of further actors, and of distractors."""
    roles = [pair.first, pair.second] if pair else []
    roles += extras + distractors
    sides = [_draw_sides(role, phase, rng) for role in roles]
    places: list[np.ndarray] = []
    if pair:
        places += _pair_paths(pair, phase, (sides[0][1], sides[1][1]), size, rng)
    for number in range(len(places), len(roles)):
        actor = number < len(roles) - len(distractors)
        candidates = [
            _path(roles[number], phase, sides[number][1], size, rng)
            for _ in range(12 if actor else 1)
        ]
        radii = [sides[other][1] for other in range(number)]
        places.append(max(candidates, key=lambda path: _clearance(path, places, radii)))
    return [
        np.column_stack([place, _draw_angles(role, phase, rng), side])
        for role, place, (side, _) in zip(roles, places, sides, strict=True)
    ]


def _draw_sides(
    role: Role, phase: Float64[np.ndarray, " time"], rng: np.random.Generator
) -> tuple[Float64[np.ndarray, " time"], float]:
    """Draws the side in each frame, and the radius that the body stays within."""
    middle, growth, constant = rng.uniform(*_SIDES), rng.uniform(*_GROWTH), _value(rng)
    driven = {"growing": phase, "shrinking": 1 - phase}.get(role.motion)
    exponent = (np.full(len(phase), constant) if driven is None else driven) - 0.5
    return middle * growth**exponent, 0.55 * middle * growth**0.5


def _draw_angles(
    role: Role, phase: Float64[np.ndarray, " time"], rng: np.random.Generator
) -> Float64[np.ndarray, " time"]:
    start, speed = rng.uniform(0, 360), rng.uniform(*_TURNS) * rng.choice((-1, 1))
    turning = role.motion == "turning"
    return start + speed * turning * np.arange(len(phase))


def _pair_paths(
    pair: Pair,
    phase: Float64[np.ndarray, " time"],
    radii: tuple[float, float],
    size: tuple[int, int],
    rng: np.random.Generator,
) -> list[Float64[np.ndarray, "time 2"]]:
    """Draws the paths of two partners, in coordinates along and across the line between them.

    The parameters are the distance along the line, the offset across it, and the position of the
    middle along (`ahead`) and across (`aside`).
    """
    near = 0.9 * sum(radii)
    room = _ROOM - 2 * max(radii)  # of the two centres
    slack = room - near
    travel = rng.uniform(0.7, 1) * min(_TRAVEL, slack / 2)
    one = np.ones(len(phase))
    distance, offset, ahead, aside = (one * _value(rng) for _ in range(4))
    heading, side = np.array(pair.first.direction), rng.choice((-1, 1))
    line, across = side * heading[::-1], heading
    if pair.relation in ("approaches", "leaves", "follows"):
        line, across = heading, heading[::-1]
    # Where the second stays in place, the middle moves half as far as the first.
    if pair.relation == "approaches":
        distance = 1 - phase
        ahead = ahead if pair.mutual else (ahead + phase) / 2
    elif pair.relation == "leaves":
        line, distance = -line, phase
        ahead = ahead if pair.mutual else (ahead + 1 - phase) / 2
    elif pair.relation == "follows":
        ahead = phase
    elif pair.relation == "passes":
        offset = 1 - phase
        aside = aside if pair.mutual else (aside + phase) / 2
    elif pair.relation == "accompanies":
        aside = phase
    elif pair.relation == "overtakes":
        aside, offset = phase, 1 - phase
    free = (slack - 2 * travel, room - 1.5 * travel)  # of the middle
    shift = [rng.uniform(-0.5, 0.5) * max(length, 0.0) for length in free]
    middle = (
        np.array(size) / 2
        + np.outer(shift[0] + travel * (ahead - 0.5), line)
        + np.outer(shift[1] + travel * (aside - 0.5), across)
    )
    half = np.outer(near + travel * distance, line) + np.outer(travel * (offset - 0.5), across)
    return [middle - half / 2, middle + half / 2]


def _path(
    role: Role,
    phase: Float64[np.ndarray, " time"],
    radius: float,
    size: tuple[int, int],
    rng: np.random.Generator,
) -> Float64[np.ndarray, "time 2"]:
    """Draws the path of a body by itself."""
    travel = rng.uniform(0.7, 1) * _TRAVEL
    path = np.empty((len(phase), 2))
    for axis in range(2):
        margin = radius + travel / 2
        start, constant = rng.uniform(margin, size[axis] - margin), _value(rng)
        driven = role.motion not in IN_PLACE and role.direction[axis] != 0
        forwards = phase if role.direction[axis] > 0 else 1 - phase
        path[:, axis] = start + travel * ((forwards if driven else constant) - 0.5)
    return path


def _clearance(
    path: Float64[np.ndarray, "time 2"], places: list[np.ndarray], radii: list[float]
) -> float:
    """Returns the smallest distance of a path to other bodies, counted from their radii."""
    return min(
        (
            float(np.abs(path - place).max(1).min()) - radius
            for place, radius in zip(places, radii, strict=True)
        ),
        default=0.0,
    )


def draw_texture(rng: np.random.Generator) -> Float32[np.ndarray, "rows columns 3"]:
    """Draws a ground of dim colours with blots of about 18 px, larger than a frame."""
    level, spread = rng.uniform(25, 60, 3), rng.uniform(5, 15)
    blots = rng.normal(level, spread, size=(16, 16, 3)).astype(np.float32)
    return cv2.resize(blots, (288, 288), interpolation=cv2.INTER_CUBIC)


def draw_drift(frames: int, rng: np.random.Generator) -> Float64[np.ndarray, "time 2"]:
    """Draws the drift of the ground in a shot, at most 0.5 px a frame on each axis."""
    # The texture has 112 px more than the long side of a frame.
    return rng.uniform(16, 96, 2) + np.outer(np.arange(frames), rng.uniform(-0.5, 0.5, 2))


def draw_pillars(
    count: int, frames: int, width: int, rng: np.random.Generator
) -> Float64[np.ndarray, "time pillars 2"]:
    """Draws the ends of pillars, which stand still in a shot."""
    left = rng.uniform(0, width, count)
    ends = np.stack([left, left + rng.uniform(5, 10, count)], axis=1)
    return np.repeat(ends[None], frames, axis=0)


def draw_colours(
    singles: int, distractors: int, rng: np.random.Generator
) -> list[Float[np.ndarray, "3"]]:
    """Draws the RGB, 0 to 255, of two partners, of further actors and of distractors.

    Partners have one warm colour, further actors have cold ones, and distractors are grey.
    """
    warm, cold = rng.uniform(0, 1 / 6), rng.uniform(0.4, 0.5) + 0.15 * np.arange(singles)
    hues = np.array([warm, warm, *cold])[:, None]
    away = np.abs((hues - np.array([0, 1 / 3, 2 / 3]) + 0.5) % 1 - 0.5)  # from red, green, blue
    colours = rng.uniform(200, 250) * (0.15 + 0.85 * np.clip(2 - 6 * away, 0, 1))
    return [*colours, *np.repeat(rng.uniform(110, 200, (distractors, 1)), 3, axis=1)]


def distractor_glyph(rng: np.random.Generator) -> Float[np.ndarray, "8 8"]:
    """Draws a glyph that is no digit: a left-right symmetric pattern of 6x6 cells."""
    half = rng.uniform(size=(6, 3)) < 0.5
    return np.pad(np.hstack([half, half[:, ::-1]]), 1).astype(np.float64)


def render(picture: Picture) -> UInt8[np.ndarray, "time height width 3"]:
    """Paints the frames of a picture."""
    shape = (len(picture.drift), picture.height, picture.width, 3)
    frames = np.empty(shape, np.float32)
    papers = [_paper(body) for body in (*picture.distractors, *picture.actors)]
    columns = np.arange(picture.width)
    for time, frame in enumerate(frames):
        x, y = picture.drift[time]
        matrix = np.array([[1, 0, x], [0, 1, y]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cv2.warpAffine(picture.texture, matrix, shape[2:0:-1], dst=frame, flags=flags)
        for body, paper in zip((*picture.distractors, *picture.actors), papers, strict=True):
            ink, rows, cols = _ink(paper, body.poses[time], picture)
            patch = frame[rows, cols]
            patch += ink[..., None] * (body.colour.astype(np.float32) - patch)
        for left, right in picture.pillars[time]:
            frame[:, (columns >= left) & (columns < right)] = picture.paint
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def box(body: Body, time: int, picture: Picture) -> Float64[np.ndarray, "4"]:
    """Returns the tight box of an actor, hidden parts included: x1, y1, x2, y2 in shares."""
    ink, rows, cols = _ink(_paper(body), body.poses[time], picture)
    (top, bottom), (left, right) = (
        np.flatnonzero((ink >= _INK).any(axis))[[0, -1]] + (0, 1) for axis in (1, 0)
    )
    size = np.array([picture.width, picture.height] * 2)
    return (np.array([left, top, right, bottom]) + [cols.start, rows.start] * 2) / size


def _paper(body: Body) -> Float32[np.ndarray, "cells cells"]:
    """Returns the glyph enlarged, with a margin for the interpolation at its edges."""
    padded = np.pad(body.glyph.astype(np.float32), 2)
    return cv2.resize(padded, None, fx=_CELL, fy=_CELL, interpolation=cv2.INTER_CUBIC)


def _ink(
    paper: Float32[np.ndarray, "cells cells"], pose: Float64[np.ndarray, "4"], picture: Picture
) -> tuple[Float32[np.ndarray, "rows columns"], slice, slice]:
    """Returns the ink of a body, 0 to 1, in the part of the frame around it, and this part."""
    x, y, angle, side = pose
    reach = int(np.ceil(0.8 * side)) + 1
    left, top = int(np.floor(x)) - reach, int(np.floor(y)) - reach
    middle = (len(paper) - 1) / 2
    matrix = cv2.getRotationMatrix2D((middle, middle), -angle, side / (8 * _CELL))
    matrix[:, 2] += [x - left - middle, y - top - middle]
    ink = cv2.warpAffine(paper, matrix, (2 * reach + 1, 2 * reach + 1), flags=cv2.INTER_LINEAR)
    rows = slice(max(top, 0), min(top + len(ink), picture.height))
    cols = slice(max(left, 0), min(left + len(ink), picture.width))
    visible = ink[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left]
    return np.clip(visible, 0, 1), rows, cols
