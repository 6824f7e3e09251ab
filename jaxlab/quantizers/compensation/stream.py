"""Calibration data on their way through the blocks of a network, one block after another."""

import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.intercept import Hook, module_paths
from jaxlab.quantizers.compensation.parts import (
  Part,
  Programs,
  array_leaves,
  park,
  reach,
  restore,
)

PyTree = Any
# Blocks of our models; the first that names anything is taken.
BLOCKS = (
  r'(.*/)?blocks(_\d+)+',
  r'(.*/)?layer\d+_\d+',
  r'(.*/)?h_\d+',
  r'(.*/)?layers_\d+',
  r'(.*/)?features_\d+',
)


def block_pattern(model: nn.Module, inputs: tuple, kwargs: dict, blocks: str | None) -> str:
  """Returns `blocks`, or the pattern of `BLOCKS` that names modules of `model`.

  Raises:
    ValueError: if none does.
  """
  if blocks is not None:
    return blocks
  paths = module_paths(model, *inputs, **kwargs)
  for pattern in BLOCKS:
    if any(re.fullmatch(pattern, path) for path in paths):
      return pattern
  raise ValueError(f'No module is named like a block ({", ".join(BLOCKS)}): give blocks=.')


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
