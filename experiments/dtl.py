"""DTL: Disentangled Transfer Learning for Visual Recognition (Fu, Zhu & Wu, AAAI 2024, arXiv 2312.07856).

What is trained is disentangled from the frozen network: a thin side network reads the input of every block,

  h <- h + (z down_i) up_i                      the side state
  z <- block_i(z) + h sigmoid(100 h)            from the middle of the network on

so that no gradient flows through the first half: of its blocks only their inputs are kept for the backward
pass. DTL+ puts one depthwise convolution, shared by all blocks, behind the activation. Claim: better than
LoRA and its like on 19 tasks of 1000 images, with a fraction of the trained numbers and of the memory.

  python -m experiments.dtl
  python -m experiments.dtl --config=vtab_vit_base --config.tasks=caltech101, --workdir=DIR
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from flax import linen as nn

from experiments.harness import launcher, results
from experiments.harness.runs import Run
from experiments.harness.settings import section
from experiments.protocols import adaptation, adaptation_checks, adaptation_comparison
from experiments.protocols.adaptation import Method, Pool, Row
from experiments.protocols.adaptation_baselines import BASELINES
from jaxlab import adapters, models

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Side:
  """The side network.

  Attributes:
    rank: of each block's map.
    extract_from: the first block, counted over all stages, whose input is read; all behind it are.
    add_from: the first block behind which the activated state is added, as behind all that follow; None: that
      of the second half.
    beta: of the activation.
    kernel_size: side of DTL+'s convolution.
  """

  rank: int = 2
  extract_from: int = 0
  add_from: int | None = None
  beta: float = 100.0
  kernel_size: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(adaptation.Settings):
  """Settings of DTL.

  Attributes:
    side: the side network.
  """

  side: Side = section(Side)
  runs: tuple[str, ...] = ('linear', 'lora', 'full', 'dtl', 'dtl_plus')


def dtl(
  side: Side, model: nn.Module, images: Any, *, pool: Pool, kernel_size: int | None = None
) -> Method:
  """Returns DTL, or with a kernel size DTL+, as a method.

  Raises:
    ValueError: for blocks that the network does not have, or that get no state.
  """
  widths = adapters.block_widths(model, images)
  paths = models.anatomy(model).block_paths
  extract, add = side.extract_from, side.add_from
  add = len(paths) // 2 if add is None else add
  if not 0 <= extract <= add < len(paths):
    raise ValueError(
      f'extract_from={extract}, add_from={add}: expected 0 <= extract_from <= add_from < {len(paths)} blocks.'
    )

  def init(key: Array, params: PyTree) -> PyTree:
    del params
    return adapters.init_side_network(
      key, widths, side.rank, extracting=paths[extract:], kernel_size=kernel_size
    )

  def features(own: PyTree, variables: PyTree, images: Array, **options: Any) -> Array:
    return adapters.apply_side_network(
      model, variables, own, images, adding=paths[add:], beta=side.beta,
      pool_patches=pool == 'mean_patches', **options,
    )  # fmt: skip

  return Method(features, init)


def table(config: Settings) -> dict[str, Row]:
  """Returns the rows that `config.runs` may name."""
  plain = functools.partial(dtl, config.side)
  plus = functools.partial(plain, kernel_size=config.side.kernel_size)
  rows = {
    'dtl': Row('DTL', 'method', plain, config.side),
    'dtl_plus': Row('DTL+', 'method', plus, config.side),
  }
  return {**BASELINES, **rows}


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from adaptation_checks.check(config, table(config))


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings on the first task by row, and that on the source task."""
  del facts
  return adaptation_comparison.programs(config, table(config))


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Adapts the network to every task in every way, and compares."""
  rows = adaptation_comparison.compare(config, workdir, table(config))
  adaptation_comparison.draw(config, rows, workdir / 'accuracy_over_memory.png')
  return results.results(
    config, rows, adaptation_comparison.metrics(config), adaptation_comparison.UNITS
  )


if __name__ == '__main__':
  launcher.main('dtl')
