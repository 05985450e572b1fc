"""Search for the state dict in a checkpoint, which may hold several in nested mappings.

State dicts are recognised by their structure, a mapping of names to tensors, not by the names of
the entries that hold them: projects call these "model_state", "state_dict", "net", "ema" and so on.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mvit_jax.common.errors import UserError
from mvit_jax.weights.torch_pickle import printable

WEIGHTS = ("plain", "ema")  # the last update's parameters, or averaged parameters

# Entries that are preferred to others: of PySlowFast, of timm and most projects, of DeiT, and of
# distributed wrappers.
_PREFERRED = ("model_state", "state_dict", "model", "module")
# Words in the names of entries with averaged parameters. A student's teacher is an average only if
# both have the same shapes.
_AVERAGED = {"ema", "averaged", "average", "avg", "swa", "shadow", "teacher", "polyak"}
_NETWORK = {"model", "net", "network", "encoder", "backbone"}
# Such words before a word for a network, as in "mean_model" or MoCo's "momentum_encoder".
_AVERAGED_NETWORK = {"mean", "momentum"}
# Entries of an optimiser hold tensors that have the names and shapes of the parameters.
_OPTIMISER = {
    "optim", "optimizer", "optimizers", "optimiser", "optimisers", "moment", "moments", "momentum",
    "sched", "scheduler", "schedulers", "scaler", "grad", "grads", "gradient", "gradients",
}  # fmt: skip
_METHODS = {"adam", "adamw"}  # may also be in the name of a network, as in "net_adamw"
_DEPTH = 8  # nested entries
_ALIKE = 0.9  # share of equal shapes above which state dicts are copies of one model


@dataclass(frozen=True)
class StateDict:
    """Tensors by name, and the entries that lead to them."""

    keys: tuple[str, ...]
    tensors: dict[str, Any]

    @property
    def path(self) -> str:
        return ".".join(self.keys)

    @property
    def averaged(self) -> bool:
        """True if an entry's name has a word for averaged parameters, such as "ema"."""
        return _is_averaged(_words(" ".join(self.keys)))


@dataclass(frozen=True)
class Selection:
    """The selected state dict of a checkpoint."""

    state: StateDict
    dropped: tuple[str, ...]  # names of the other entries, such as "epoch"
    # Paths of other entries with many tensors, each with the `weights` that select it, or "".
    alternatives: dict[str, str]


def select(
    top: Any,
    is_tensor: Callable[[Any], bool],
    where: str,
    *,
    weights: str | None = None,
    recognised: Callable[[Collection[str]], bool] | None = None,
) -> Selection:
    """Selects the state dict inside nested mappings.

    Args:
      top: a checkpoint.
      is_tensor: returns True for a tensor, which has a `shape`.
      where: name of the checkpoint for messages.
      weights: "plain", "ema" for averaged parameters, or None for averaged parameters if there are
        any.
      recognised: returns True for the tensor names of a supported model. State dicts of such models
        are preferred.

    Raises:
      UserError: there is no state dict, or none with the required weights.
    """
    if weights not in (None, *WEIGHTS):
        raise UserError(f"weights must be plain or ema, not {weights!r}")
    if not isinstance(top, Mapping):
        raise UserError(f"{where} holds a {printable(type(top).__name__)}: save a state_dict()")
    candidates = states = _find(top, is_tensor)
    if not states:
        raise UserError(_explain_missing(top, is_tensor, where))
    if recognised is not None:
        states = [state for state in states if recognised(state.tensors)] or states
    largest = max(len(state.tensors) for state in states)
    states = sorted((s for s in states if 2 * len(s.tensors) >= largest), key=_preference)
    plain = next((state for state in states if not state.averaged), None)
    averaged = next(
        (s for s in states if s.averaged and (plain is None or _alike(s.tensors, plain.tensors))),
        None,
    )
    by_kind = {"plain": plain, "ema": averaged}
    state = averaged or plain if weights is None else by_kind[weights]
    if state is None:
        other = next(state for state in by_kind.values() if state is not None)
        kind = "averaged" if weights == "ema" else "plain"
        name = printable(other.path or "one state dict")
        raise UserError(f"{where} has no {kind} weights, only {name}: leave out weights={weights}")
    kinds = {id(state): kind for kind, state in by_kind.items()}
    counts = {
        other.path: len(other.tensors) for other in [*states, *candidates] if other is not state
    }
    counts |= _lists(top, is_tensor)
    by_path = {other.path: kinds.get(id(other), "") for other in states}
    many = [path for path, count in counts.items() if 2 * count >= len(state.tensors)]
    alternatives = {path: by_path.get(path, "") for path in many}
    return Selection(state, tuple(_dropped(top, state)), alternatives)


def _words(name: str) -> list[str]:
    """Splits a name at punctuation and capitals: "modelEMA.net_1" has model, ema and net."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def _is_averaged(words: list[str]) -> bool:
    return not _AVERAGED.isdisjoint(words) or any(
        one in _AVERAGED_NETWORK and other in _NETWORK for one, other in pairwise(words)
    )


def _is_optimiser(name: str) -> bool:
    words = _words(name)
    if ("exp", "avg") in pairwise(words):  # of Adam
        return True
    if not _METHODS.isdisjoint(words) and _NETWORK.isdisjoint(words):
        return True
    return not _OPTIMISER.isdisjoint(words) and not _is_averaged(words)


def _find(top: Mapping[Any, Any], is_tensor: Callable[[Any], bool]) -> list[StateDict]:
    """Returns all state dicts except those of an optimiser, unless there is only one."""
    states = list(_search(_mappings(top), is_tensor))
    if not states:
        states = list(_search(_mappings(top, optimiser=True), is_tensor))
        states = states if len(states) == 1 else []
    return states


def _mappings(
    top: Mapping[Any, Any], *, optimiser: bool = False
) -> list[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Returns pairs of keys and mapping: `top`, then mappings nested in it, outer ones first.

    Mappings more than `_DEPTH` keys deep are excluded, and entries of an optimiser by default.
    """
    # A pickle can nest a mapping in itself, or in many others.
    nested: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), top)]
    visited = {id(top)}
    for keys, mapping in nested:  # grows
        for name, inner in mapping.items() if len(keys) < _DEPTH else ():
            if not isinstance(inner, Mapping) or id(inner) in visited:
                continue
            if isinstance(name, str) and (optimiser or not _is_optimiser(name)):
                visited.add(id(inner))
                nested.append(((*keys, name), inner))
    return nested


def _lists(top: Mapping[Any, Any], is_tensor: Callable[[Any], bool]) -> dict[str, int]:
    """Returns the number of tensors in each list by its path, such as "ema.shadow_params"."""
    return {
        ".".join((*keys, str(name))): sum(map(is_tensor, value))
        for keys, mapping in _mappings(top)
        for name, value in mapping.items()
        if isinstance(value, list | tuple) and not _is_optimiser(str(name))
    }


def _search(
    mappings: list[tuple[tuple[str, ...], Mapping[Any, Any]]], is_tensor: Callable[[Any], bool]
) -> Iterator[StateDict]:
    """Yields the mappings that hold mostly tensors."""
    for keys, mapping in mappings:
        tensors = {k: v for k, v in mapping.items() if isinstance(k, str) and is_tensor(v)}
        if 2 * len(tensors) <= len(mapping):
            continue
        copies = _split(tensors)
        yield from (StateDict((*keys, name), copy) for name, copy in copies.items())
        if not copies:
            yield StateDict(keys, tensors)


def _split(tensors: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the copies of one model in a state dict, by the prefix of their names.

    A Lightning module with an average has the names "model.norm.weight" and "ema.norm.weight".
    Empty if the state dict is of one model.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition(".")
        groups.setdefault(prefix, {})[rest] = tensor
    largest = max(groups.values(), key=len)
    copies = {prefix: group for prefix, group in groups.items() if _alike(group, largest)}
    whole = sum(map(len, copies.values())) >= _ALIKE * len(tensors)
    averaged = any(StateDict((prefix,), {}).averaged for prefix in copies)
    if not (whole and averaged and 1 < len(copies) < len(tensors)):
        return {}
    # Stable Diffusion's LitEma removes the dots from the names, and adds a decay and a counter.
    dotless = {p: copy for p, copy in copies.items() if not any("." in name for name in copy)}
    dotted = [name for p, copy in copies.items() if p not in dotless for name in copy]
    names = {name.replace(".", ""): name for name in dotted}
    for prefix, copy in dotless.items():
        copies[prefix] = {names[n]: tensor for n, tensor in copy.items() if n in names} or copy
    return copies


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Returns True if almost all tensors of two state dicts have equal shapes, in any order."""
    shapes = [Counter(tuple(t.shape) for t in tensors.values()) for tensors in (one, other)]
    return (shapes[0] & shapes[1]).total() >= _ALIKE * max(len(one), len(other))


def _preference(state: StateDict) -> list[int]:
    """Returns a sort key: entries with known names before others, and outer before inner ones."""
    last = len(_PREFERRED)
    return [_PREFERRED.index(key) if key in _PREFERRED else last for key in state.keys]


def _dropped(top: Mapping[Any, Any], state: StateDict) -> Iterator[str]:
    """Yields the paths of all entries beside a state dict and beside the entries around it."""
    before, here = "", top
    for key in state.keys:
        yield from (before + str(name) for name in here if name != key)
        if key not in here:  # a prefix of names
            return
        before, here = f"{before}{key}.", here[key]
    yield from (before + str(name) for name in here if name not in state.tensors)


def _explain_missing(top: Mapping[Any, Any], is_tensor: Callable[[Any], bool], where: str) -> str:
    """Returns the error message for a checkpoint without a state dict."""
    mappings = [mapping for _, mapping in _mappings(top)]
    here = max(mappings, key=lambda mapping: sum(map(is_tensor, mapping.values())))
    wrong = [key for key, value in here.items() if not (isinstance(key, str) and is_tensor(value))]
    listed = ", ".join(printable(repr(key)) for key in (wrong[:8])) + ", ..." * (len(wrong) > 8)
    if not any(map(is_tensor, here.values())):
        content = f"holds only {listed}" if listed else "is empty"
        return f"{where} has no state dict, it {content}: save a state_dict()"
    return f"{where} has entries other than named tensors: {listed}; remove them"
