"""Calibration data on their way through the blocks of a network, one block after another."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxlab.models.blockwise import Part, Programs, park, reach, restore
from jaxlab.models.intercept import Hook
from jaxlab.models.main_arrays import array_leaves

PyTree = Any


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
    inputs: Sequence[tuple[tuple, dict[str, Any]]],
    programs: Programs,
  ):
    self.root, self.parts, self.hooks, self.programs = root, parts, hooks, programs
    self.variables = variables
    self.images = [array_leaves(call) for call in inputs]
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
