"""Block by block through a quantized network, fitting a compensation at each: QwT, QwT-v2 and NBC.

Calibration batches are streamed: a block sees one batch at a time on the devices, its inputs and
outputs wait in host memory. Each block runs once in float and once quantized; the next block gets the
compensated output.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.anatomy import anatomy as anatomy_of
from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.block_stream import Stream
from jaxlab.models.blockwise import Programs, find_blocks
from jaxlab.models.intercept import Hook
from jaxlab.quantizers.compensation.hook import COLLECTION, compensation_hook
from jaxlab.quantizers.compensation.methods import Method, QwT, QwTv2
from jaxlab.quantizers.compensation.recalibration import with_constants
from jaxlab.quantizers.compensation.walk import BlockWalk

Array = jax.Array
PyTree = Any


class Report(NamedTuple):
  """What the compensation did, one entry a compensated module, in order of execution.

  Attributes:
    paths: of the modules.
    error_before: mean squared error on the calibration data against the teacher, float64 `[modules]`.
    error_after: the same of the compensated module, with the arithmetic of `dtype`.
    r2: of the fit; for QwT-v2 `1 - error_after / error_before`.
    skipped: whether the gate left the module as it is.
    parameters: values that were added.
    multiply_adds: that were added, for one example.
  """

  paths: tuple[str, ...]
  error_before: np.ndarray
  error_after: np.ndarray
  r2: np.ndarray
  skipped: np.ndarray
  parameters: np.ndarray
  multiply_adds: np.ndarray


class Compensated(NamedTuple):
  """A compensated network: `jaxlab.models.apply(model, variables, x, hooks=hooks)`.

  Attributes:
    variables: those of the quantized network and the collection `'compensation'`; `QwTv2` also changes the
      ranges of inputs.
    hooks: those of the quantized network and one that compensates.
    report: see `Report`.
  """

  variables: dict[str, PyTree]
  hooks: tuple[Hook, ...]
  report: Report


def compensate(
  model: nn.Module,
  quantized: tuple[PyTree, PyTree, Sequence[Hook]],
  batches: Iterable[Any],
  method: Method | None = None,
  *,
  blocks: str | None = None,
  anatomy: Anatomy | None = None,
  start_block: int = 0,
  target: Literal['local', 'global'] = 'local',
  dtype: Any = jnp.float16,
  float_hooks: Sequence[Hook] | None = None,
  programs: Programs | None = None,
  **kwargs: Any,
) -> Compensated:
  """Fits and adds the compensation of every block of a quantized network, in closed form.

  Batches may be sharded over a mesh: sums are over the whole batch, and the result is that of one device.
  Blocks of one shape share one compilation.

  Args:
    model: any Linen module whose blocks are modules called one after another, each on what the one before
      returned (with whatever the model computes in between and hands in besides).
    quantized: `(variables, float_variables, hooks)`, e.g. from `repq`: the quantized network, and the
      variables of the same network with the quantizers off.
    batches: calibration inputs of one shape; a tuple is several arguments. No labels. Iterated once.
    method: `QwT`, `QwTv2` or `NBC`; None: `QwT()`.
    blocks: regular expression of the blocks' paths; None: the blocks of the anatomy.
    anatomy: the names of the model's parts; None: `models.anatomy(model)`. Read without `blocks`, and by
      `QwTv2('branch')`.
    start_block: blocks before this one are left as they are.
    target: what the quantized block's output is compared with: the float block on the same, quantized
      network's input (`'local'`, as in QwT's code), or the float network's activation there (`'global'`).
    dtype: of the compensation's matrix product while later blocks are fitted, and in the returned hooks:
      float16 as in QwT's evaluation, or float32.
    float_hooks: under which `float_variables` are the float network; None: the same hooks (they are
      expected to do nothing where the variables hold no quantization constants). `()` for none.
    programs: compiled functions of earlier calls, e.g. at other bit-widths: a `Programs()` that is handed to
      all of them.
    **kwargs: passed to the model, e.g. `train=False`.

  Raises:
    ValueError: if there is no batch, the model's parts are not known, no block matches, blocks are nested,
      shared or stacked, `start_block` is out of range, shapes do not fit the method, or activations are not
      finite.

  Warns:
    RuntimeWarning: if a fit has fewer rows than unknowns.
  """
  method = QwT() if method is None else method
  if target not in ('local', 'global'):
    raise ValueError(f"target={target!r}; choose 'local' or 'global'.")
  variables, float_variables, hooks = dict(quantized[0]), dict(quantized[1]), tuple(quantized[2])
  float_hooks = hooks if float_hooks is None else tuple(float_hooks)
  inputs = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
  if not inputs:
    raise ValueError('batches is empty: the compensation needs at least one calibration batch.')
  root, parts = find_blocks(model, variables, inputs[0], kwargs, hooks, blocks, anatomy)
  if not 0 <= start_block < len(parts):
    raise ValueError(f'start_block={start_block} is not one of the {len(parts)} blocks.')
  parts = parts[start_block:]

  ends = _branch_ends(model, method, anatomy)
  programs = Programs() if programs is None else programs
  networks = [Stream(root, parts, variables, hooks, inputs, kwargs, programs)]
  if target == 'global':
    networks.append(Stream(root, parts, float_variables, float_hooks, inputs, kwargs, programs))
  arrays: dict[str, dict[str, Array]] = {}
  entries: list[tuple] = []
  for index, block in enumerate(parts):
    for network in networks:
      network.advance(index)
    walk = BlockWalk(
      block, method, variables, float_variables, hooks, float_hooks, dtype, programs, ends
    )
    fitted, outputs = walk.run(networks)
    arrays |= fitted
    entries += walk.entries
    variables = with_constants(variables, walk.constants)
    for network, out in zip(networks, outputs):
      network.outputs = out
  report = Report(tuple(arrays), *(np.asarray(column) for column in zip(*entries)))
  flat = {f'{path}/{name}': leaf for path, own in arrays.items() for name, leaf in own.items()}
  tree = traverse_util.unflatten_dict(flat, sep='/')
  hook = compensation_hook(list(arrays), dtype)
  return Compensated({**variables, COLLECTION: tree}, (*hooks, hook), report)


def _branch_ends(model: nn.Module, method: Method, anatomy: Anatomy | None) -> dict[str, list[str]]:
  """Returns the last layer of each branch, by block, if the method compensates there."""
  if not isinstance(method, QwTv2) or method.granularity != 'branch' or method.modules:
    return {}
  parts = anatomy_of(model) if anatomy is None else anatomy
  return {
    block.path: [branch.layers[-1] for branch in block.branches]
    for block in (*parts.blocks, *parts.transitions)
  }
