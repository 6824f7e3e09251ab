"""The hook that compensates the modules of a network by the arrays of their own."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlab.models.blockwise import array_leaves
from jaxlab.models.intercept import Hook, Site, any_of
from jaxlab.quantizers.compensation.bipolar import BipolarCompensation, apply_nbc
from jaxlab.quantizers.compensation.channel_affine import ChannelAffine, apply_channel_affine
from jaxlab.quantizers.compensation.linear import LinearCompensation
from jaxlab.quantizers.compensation.linear_apply import apply_linear_compensation

Array = jax.Array
COLLECTION = 'compensation'


def compensation_hook(paths: Sequence[str], dtype: Any = jnp.float16) -> Hook:
  """Returns the hook that compensates the modules at `paths` by the arrays in collection `'compensation'`.

  The arrays are ordinary variables: `jax.grad` reaches them (QwT* trains them, with dtype float32).

  Args:
    paths: of modules that have arrays.
    dtype: of the matrix product's operands.
  """
  return Hook(any_of(paths), call=_Compensate(jnp.dtype(dtype)), collection=COLLECTION)


@dataclasses.dataclass(frozen=True)
class _Compensate:
  """The hook's function; equal for equal dtypes, so that programs with equal hooks are compiled once."""

  dtype: Any

  def __call__(self, site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    out = call(*args, **kwargs)
    leaves, treedef = jax.tree.flatten(out)
    names = ('gamma', 'beta') if site.has('gamma') else ('weight', 'bias')
    names = BipolarCompensation._fields[:-1] if site.has('kappa') else names
    own = {name: site.read(name) for name in names}
    x = array_leaves((args, kwargs))[0]
    return jax.tree.unflatten(treedef, [apply_arrays(leaves[0], x, own, self.dtype), *leaves[1:]])


def apply_arrays(y: Array, x: Array, arrays: dict[str, Array], dtype: Any) -> Array:
  """Returns the compensated output for the output y and input x of a module, and its arrays by name."""
  if 'gamma' in arrays:
    return apply_channel_affine(y, ChannelAffine(**arrays))
  if 'kappa' in arrays:
    return apply_nbc(y, x, BipolarCompensation(**arrays, r2=jnp.zeros(())), dtype)
  return apply_linear_compensation(y, x, LinearCompensation(**arrays, r2=jnp.zeros(())), dtype)
