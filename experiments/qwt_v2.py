"""QwT-v2 (Tang et al. 2025, arXiv 2505.20932): a scale and a shift for every output channel.

The output of every quantized layer is compensated by two numbers a channel, in closed form. An integer engine
multiplies each channel by a scale and adds a bias anyway, so that the compensation melts into its constants.
Claim: it matches QwT (here: it is better than quantization alone at few bits) for a fraction of its
parameters and, folded into the layers, at no cost.

  python -m experiments.qwt_v2
  python -m experiments.qwt_v2 --config=imagenet --workdir=DIR
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

FLOAT32 = Fitting(dtype='float32')


@dataclasses.dataclass(frozen=True)
class Variant:
  """Another compensation of the same kind."""

  method: compensation.QwTv2 = section(compensation.QwTv2)
  fitting: Fitting = FLOAT32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(quantized_networks.Settings):
  """Settings of QwT-v2.

  Attributes:
    qwt_v2: where scales and shifts stand.
    fitting: how they are fitted.
    variants: further rows, by title.
    qwt: the linear layers that it is compared with.
  """

  qwt_v2: compensation.QwTv2 = section(compensation.QwTv2)
  fitting: Fitting = FLOAT32
  variants: dict[str, Variant] = dataclasses.field(default_factory=dict)
  qwt: compensation.QwT = section(compensation.QwT)


def methods(config: Settings) -> dict[str, Method]:
  """Returns the rows of the comparison: QwT-v2, its variants, and QwT."""

  def own(role: str, method: compensation.QwTv2, fitting: Fitting) -> Method:
    return Method(role, method, fitting, transitions=method.granularity == 'linear')

  rows = {'QwT-v2': own('method', config.qwt_v2, config.fitting)}
  for title, variant in config.variants.items():
    rows[title] = own('reference', variant.method, variant.fitting)
  return rows | {'QwT': Method('reference', config.qwt)}


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from post_training.check(config, methods(config))


def programs(config: Settings, facts: None = None) -> dict[str, Run | Call]:
  """Returns the trainings of float networks, and the pipeline of the first, by name."""
  del facts
  return quantized_networks.programs(config)


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Quantizes every network at every bit-width, alone, with QwT-v2 and with QwT."""
  return post_training.compare(config, workdir, methods(config))


if __name__ == '__main__':
  launcher.main('qwt_v2')
