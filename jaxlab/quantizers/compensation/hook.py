"""The hook that compensates the modules of a network by the arrays of their own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlab.models.intercept import Hook, Site
from jaxlab.models.main_arrays import main_input, main_output
from jaxlab.quantizers.compensation.bipolar import BipolarCompensation, apply_nbc
from jaxlab.quantizers.compensation.channel_affine import ChannelAffine, apply_channel_affine
from jaxlab.quantizers.compensation.linear import LinearCompensation
from jaxlab.quantizers.compensation.linear_apply import apply_linear_compensation

Array = jax.Array
COLLECTION = 'compensation'


def compensation_hook(dtype: Any = jnp.float16) -> Hook:
  """Returns the hook that compensates the modules that have arrays in the collection `'compensation'`.

  The arrays are ordinary variables: `jax.grad` reaches them (QwT* trains them, with dtype float32).

  Args:
    dtype: of the matrix product's operands.

  Raises (when the model is applied):
    ValueError: if the variables have no such collection: the network was not compensated.
  """
  return Hook('.*', call=_Compensate(jnp.dtype(dtype)), collection=COLLECTION)


@dataclasses.dataclass(frozen=True)
class _Compensate:
  """The hook's function; equal for equal dtypes, so that programs with equal hooks are compiled once."""

  dtype: Any

  def __call__(self, site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not site.path and COLLECTION not in site.module.variables:
      raise ValueError(
        f'The variables have no collection {COLLECTION!r}, so nothing would be compensated: call the network '
        f'that `compensate` returns, or pass the variables of its `unbind()`.'
      )
    out = call(*args, **kwargs)
    kinds = {'gamma': ('gamma', 'beta'), 'kappa': BipolarCompensation._fields[:-1]}
    kinds['weight'] = ('weight', 'bias')
    names = next((names for mark, names in kinds.items() if site.has(mark)), None)
    if names is None:
      return out
    own = {name: site.read(name) for name in names}
    x = main_input(site, args, kwargs)
    y = main_output(out, x)
    new = apply_arrays(y, x, own, self.dtype)
    return jax.tree.map(lambda leaf: new if leaf is y else leaf, out)


def apply_arrays(y: Array, x: Array, arrays: dict[str, Array], dtype: Any) -> Array:
  """Returns the compensated output for the output y and input x of a module, and its arrays by name."""
  if 'gamma' in arrays:
    return apply_channel_affine(y, ChannelAffine(**arrays))
  if 'kappa' in arrays:
    return apply_nbc(y, x, BipolarCompensation(**arrays, r2=jnp.zeros(())), dtype)
  return apply_linear_compensation(y, x, LinearCompensation(**arrays, r2=jnp.zeros(())), dtype)
