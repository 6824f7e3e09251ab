"""Block by block through a quantized network, fitting a compensation at each: QwT, QwT-v2 and NBC.

Calibration batches are streamed: a block sees one batch at a time on the devices, its inputs and
outputs wait in host memory. Each block runs once in float and once quantized; the next block gets the
compensated output.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.anatomy import anatomy as anatomy_of
from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.block_stream import Stream
from jaxlab.models.blockwise import Programs, find_blocks
from jaxlab.quantizers.compensation.hook import COLLECTION, compensation_hook
from jaxlab.quantizers.compensation.methods import Method, QwT, QwTv2
from jaxlab.quantizers.compensation.recalibration import with_constants
from jaxlab.quantizers.compensation.walk import BlockWalk, check_block
from jaxlab.quantizers.networks.batches import Batches, Counted, as_call, counted_mask, peek
from jaxlab.quantizers.networks.quantized import Quantized, Report, check_quantized

Array = jax.Array
PyTree = Any


def compensate(
  quantized: Quantized,
  batches: Batches,
  method: Method | None = None,
  *,
  anatomy: Anatomy | None = None,
  blocks: str | None = None,
  start_block: int = 0,
  target: Literal['local', 'global'] = 'local',
  dtype: Any = jnp.float16,
  programs: Programs | None = None,
  counted: Counted = None,
  **kwargs: Any,
) -> Quantized:
  """Fits and adds the compensation of every block of a quantized network, in closed form.

  Batches may be sharded over a mesh: sums are over the whole batch, and the result is that of one device.
  Blocks of one shape share one compilation.

  Args:
    quantized: a network of any method here, in which blocks are modules called one after another, each on
      what the one before returned (with whatever the model computes in between and hands in besides). Learned
      steps (`lsq`) are constants from now on.
    batches: calibration inputs, all of which are fitted to; the last may be smaller. One that is a tuple is
      several arguments, one that is a mapping keywords. No labels.
    method: `QwT`, `QwTv2` or `NBC`; None: `QwT()`.
    anatomy: the names of the model's parts; None: those that the network knows, or `models.anatomy(model)`.
      Read without `blocks`, and by `QwTv2('branch')`.
    blocks: regular expression of the blocks' paths; None: the blocks of the anatomy.
    start_block: blocks before this one are left as they are.
    target: what the quantized block's output is compared with: the float block on the same, quantized
      network's input (`'local'`, as in QwT's code), or the float network's activation there (`'global'`).
    dtype: of the compensation's matrix product while later blocks are fitted, and in the returned hooks:
      float16 as in QwT's evaluation, or float32.
    programs: compiled functions of earlier calls, e.g. at other bit-widths: a `Programs()` that is handed to
      all of them.
    counted: which positions are fitted to (others are padding): the name of the model's argument that is
      the mask `[batch, ...]`, or a function of its arguments. The convolutional form counts whole images.
    **kwargs: passed to the model with every batch, over the network's own.

  Returns:
    The network with a collection `'compensation'` and a `report`; `QwTv2` also changes the ranges of inputs.

  Raises:
    ValueError: for what is no `Quantized`, or one that is compensated or in integers already; if there is no
      batch, the model's parts are not known, no block matches, blocks are nested, shared or stacked, the
      activations of a block cannot be told among what it is given or returns, `start_block` is out of range,
      shapes do not fit the method, or activations are not finite.

  Warns:
    RuntimeWarning: if a fit has fewer rows than unknowns.
  """
  method = QwT() if method is None else method
  if not isinstance(method, Method):
    raise ValueError(f'method is a QwT(...), QwTv2(...) or NBC(...); got {method!r}.')
  if target not in ('local', 'global'):
    raise ValueError(f"target={target!r}; choose 'local' or 'global'.")
  check_quantized(quantized, 'compensate')
  if COLLECTION in quantized.variables:
    raise ValueError('The network is compensated already: compensate the one it was made of.')
  model, kwargs = quantized.model, {**quantized.kwargs, **kwargs}
  anatomy = quantized.anatomy if anatomy is None else anatomy
  float_variables, hooks = quantized.in_float().unbind()
  variables, _ = quantized.unbind()
  inputs = [as_call(batch, kwargs) for batch in peek(batches)[1]]
  masks = [counted_mask(counted, model, call) for call in inputs]
  root, parts = find_blocks(model, variables, *inputs[0], hooks, blocks, anatomy)
  if not 0 <= start_block < len(parts):
    raise ValueError(f'start_block={start_block} is not one of the {len(parts)} blocks.')
  parts = parts[start_block:]

  ends = _branch_ends(model, method, anatomy)
  for block in parts:
    check_block(block, method, variables, ends, len(inputs))
  programs = Programs() if programs is None else programs
  networks = [Stream(root, parts, variables, hooks, inputs, programs)]
  if target == 'global':
    networks.append(Stream(root, parts, float_variables, hooks, inputs, programs))
  arrays: dict[str, dict[str, Array]] = {}
  entries: list[tuple] = []
  for index, block in enumerate(parts):
    for network in networks:
      network.advance(index)
    walk = BlockWalk(block, method, variables, float_variables, hooks, dtype, programs, masks, ends)
    fitted, outputs = walk.run(networks)
    arrays |= fitted
    entries += walk.entries
    variables = with_constants(variables, walk.constants)
    for network, out in zip(networks, outputs):
      network.outputs = out
  report = Report(tuple(arrays), *(np.asarray(column) for column in zip(*entries)))
  flat = {f'{path}/{name}': leaf for path, own in arrays.items() for name, leaf in own.items()}
  return Quantized.of(
    model,
    {**variables, COLLECTION: traverse_util.unflatten_dict(flat, sep='/')},
    float_variables,
    (*hooks, compensation_hook(dtype)),
    kwargs=kwargs,
    anatomy=anatomy,
    report=report,
    skipped=quantized.skipped,
    rounded=quantized.rounded,
    layers=quantized.layers,
  )


def _branch_ends(model: nn.Module, method: Method, anatomy: Anatomy | None) -> dict[str, list[str]]:
  """Returns the last layer of each branch, by block, if the method compensates there."""
  if not isinstance(method, QwTv2) or method.granularity != 'branch' or method.modules:
    return {}
  parts = anatomy_of(model) if anatomy is None else anatomy
  return {
    block.path: [branch.layers[-1] for branch in block.branches]
    for block in (*parts.blocks, *parts.transitions)
  }
