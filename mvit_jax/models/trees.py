"""Parameters as plain trees: nested dicts with string keys, and the paths of their leaves."""

from collections.abc import Mapping
from typing import Any

import jax

Params = dict[str, Any]  # nested, string keys, arrays at the leaves


def flat(params: Any) -> dict[str, Any]:
    """Parameters, or anything nested like them, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(str(k.key) for k in path): leaf for path, leaf in leaves}


def nested(params: Mapping[str, Any]) -> Params:
    """Parameters nested by the parts of their paths."""
    tree: Params = {}
    for path, value in params.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def first_difference(model: Any, found: Any) -> str | None:
    """Says in which tensor, by name, two trees of arrays or shapes differ first; or None."""
    ours, theirs = (
        {path: list(leaf.shape) for path, leaf in flat(tree).items()} for tree in (model, found)
    )
    for name in sorted({*ours, *theirs}):
        mine, other = ours.get(name, "missing"), theirs.get(name, "missing")
        if mine != other:
            return f"{name} is {other} there and {mine} in this model"
    return None
