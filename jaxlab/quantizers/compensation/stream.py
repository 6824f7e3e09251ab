"""Calibration data on their way through the blocks of a network, one block after another."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.anatomy import anatomy as anatomy_of
from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.intercept import Hook, any_of, module_paths, raise_unmatched
from jaxlab.quantizers.compensation.parts import (
  Part,
  Programs,
  Skeleton,
  array_leaves,
  find_parts,
  park,
  reach,
  restore,
)

PyTree = Any


def find_blocks(
  model: nn.Module,
  variables: PyTree,
  args: tuple,
  kwargs: dict[str, Any],
  hooks: Sequence[Hook],
  blocks: str | None = None,
  anatomy: Anatomy | None = None,
) -> tuple[Part, list[Part]]:
  """Returns the model as a part, and its blocks in order of execution.

  Traces abstractly: no computation.

  Args:
    model: any Linen module.
    variables: its variables.
    args: its positional arguments, arrays or shapes.
    kwargs: its keyword arguments.
    hooks: of the model.
    blocks: regular expression of the blocks' paths; None: the blocks of `anatomy`.
    anatomy: of the model; None: what `models.anatomy` says.

  Raises:
    ValueError: if the model is unknown, no module or not every block is there, or blocks are nested, called
      twice or stacked.
  """
  wanted = ()
  if blocks is None:
    wanted = (anatomy_of(model) if anatomy is None else anatomy).block_paths
    if not wanted:
      raise ValueError(f'The anatomy of {type(model).__name__} names no blocks: give blocks=.')
  pattern = any_of(wanted) if blocks is None else blocks
  root = Part('', model, Skeleton.of((args, kwargs)))
  parts = find_parts(root, variables, array_leaves((args, kwargs)), hooks, pattern)
  missing = sorted(set(wanted) - {part.path for part in parts})
  if missing or not parts:
    paths = module_paths(model, *args, **kwargs)
    raise_unmatched(missing or [pattern], paths, 'block pattern', 'module')
  return root, parts


class Stream:
  """The calibration batches on their way through one network, parked at the current block's input.

  Attributes:
    leaves: arrays of the current block's arguments, for each batch.
    outputs: arrays that it returned, for each batch; whoever ran the block puts them here before the next
      `advance`.
  """

  def __init__(
    self,
    root: Part,
    parts: Sequence[Part],
    variables: PyTree,
    hooks: Sequence[Hook],
    inputs: Sequence[tuple],
    kwargs: dict[str, Any],
    programs: Programs,
  ):
    self.root, self.parts, self.hooks, self.programs = root, parts, hooks, programs
    self.variables = variables
    self.images = [array_leaves((batch, kwargs)) for batch in inputs]
    self.leaves: list[list] = []
    self.outputs: list[list] = []

  def advance(self, index: int) -> None:
    """Goes on to the input of block `index`."""
    part = self.parts[index]
    if index and all(source is not None for source in part.sources):
      pools = [{'in': old, 'out': new} for old, new in zip(self.leaves, self.outputs)]
      self.leaves = [[pool[kind][i] for kind, i in part.sources] for pool in pools]
      return

    root, parts, hooks = self.root, self.parts, self.hooks  # compiled functions outlive the stream

    def between(variables, images, outputs):
      known = {index - 1: outputs} if index else {}
      return reach(root, parts, index, variables, images, known, hooks)

    run, new = None, []
    for batch, images in enumerate(self.images):
      images = [jnp.asarray(image) for image in images]
      outputs = restore(self.outputs[batch]) if index else []
      run = run or self.programs(between, self.variables, images, outputs)
      new.append(park(run(self.variables, images, outputs)))
    self.leaves = new
