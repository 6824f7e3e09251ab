"""Which of the arrays that a block is given and returns are its activations, however it is called."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlab.models.intercept import Site, arguments_in_order

Array = jax.Array
PyTree = Any


def is_array(leaf: Any) -> bool:
  """Returns whether a leaf is an array (or its shape), and not a flag, number or name."""
  return hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')


def array_leaves(tree: PyTree) -> list[Array]:
  """Returns the arrays among the leaves of `tree`."""
  return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


def main_input(site: Site, args: tuple, kwargs: Mapping[str, Any]) -> Array | None:
  """Returns the first array of floats (or else the first array) that a module is called with.

  First in the order of the signature. None if there is none, or several keywords hold arrays that the
  signature does not name.
  """
  names = inspect.signature(getattr(type(site.module), site.method)).parameters
  given = arguments_in_order(site, args, kwargs)
  held = {name: own for name, value in given.items() if (own := _floats(value))}
  held = held or {name: own for name, value in given.items() if (own := array_leaves(value))}
  first = next(iter(held), None)
  if first is None or (isinstance(first, str) and first not in names and len(held) > 1):
    return None
  return held[first][0]


def main_output(out: PyTree, x: Array | None) -> Array | None:
  """Returns the array among what a module returns that are its activations; None if that cannot be told.

  An array itself; the first floats of a tuple or list; of a mapping the only floats, or the only ones in the
  shape of the input `x`.
  """
  if is_array(out):
    return out
  arrays = _floats(out)
  if isinstance(out, tuple | list):
    for element in out:
      if found := _floats(element):
        return main_output(element, x) if isinstance(element, Mapping) else found[0]
    return next(iter(array_leaves(out)), None)
  if len(arrays) > 1 and x is not None:
    arrays = [leaf for leaf in arrays if leaf.shape == x.shape]
  return arrays[0] if len(arrays) == 1 else None


def _floats(tree: PyTree) -> list[Array]:
  return [leaf for leaf in array_leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def index_of(array: Array | None, tree: PyTree) -> int | None:
  """Returns the place of an array among `array_leaves(tree)`, by identity; None for None."""
  if array is None:
    return None
  return next(i for i, leaf in enumerate(array_leaves(tree)) if leaf is array)
