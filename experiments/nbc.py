"""NBC: Nonlinear Bipolar Compensation (Sun and Wu 2026, arXiv 2605.16423).

QwT's linear layer between sign-preserving logarithms of the block's input and of its error: nonlinear, fitted
in closed form, and not ruled by the few huge activations of transformers. Claim: level with QwT on clean
networks, and better where there are outliers. The abstract fixes the structure; the transformation
`sign(x) ln(1 + |x| / s)` is this library's choice.

  python -m experiments.nbc
  python -m experiments.nbc --config=imagenet --workdir=DIR
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

from experiments.harness import launcher
from experiments.harness.runs import Call, Run
from experiments.harness.settings import section
from experiments.protocols import post_training, quantized_networks
from experiments.protocols.quantized_networks import Fitting, Method
from jaxlab.quantizers import compensation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(quantized_networks.Settings):
  """Settings of NBC.

  Attributes:
    nbc: the compensation.
    fitting: how it is fitted.
    variants: further rows, by title, such as other rules for the scales.
    qwt: the linear layers that it is compared with.
  """

  nbc: compensation.NBC = section(compensation.NBC)
  fitting: Fitting = section(Fitting)
  variants: dict[str, compensation.NBC] = dataclasses.field(default_factory=dict)
  qwt: compensation.QwT = section(compensation.QwT)


def methods(config: Settings) -> dict[str, Method]:
  """Returns the rows of the comparison: NBC, its variants, and QwT."""
  rows = {'NBC': Method('method', config.nbc, config.fitting)}
  for title, variant in config.variants.items():
    rows[title] = Method('reference', variant, config.fitting)
  return rows | {'QwT': Method('baseline', config.qwt)}


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from post_training.check(config, methods(config))


def programs(config: Settings, facts: None = None) -> dict[str, Run | Call]:
  """Returns the trainings of float networks, and the pipeline of the first, by name."""
  del facts
  return quantized_networks.programs(config)


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Quantizes every network at every bit-width, alone, with NBC and with QwT."""
  return post_training.compare(config, workdir, methods(config))


if __name__ == '__main__':
  launcher.main('nbc')
