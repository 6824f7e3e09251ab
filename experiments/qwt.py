"""QwT: Quantization without Tears (Fu et al., CVPR 2025, arXiv 2411.13918).

Behind every block of a quantized network stands a small linear layer that predicts, from the block's input,
the error the quantized block makes: least squares, solved in closed form on 512 unlabeled inputs. Claim: it
recovers a clear part of what post-training quantization loses at few bits, and costs nothing at many. QwT*
goes on from there for an epoch of gradient steps on these layers and the classifier; PTQ* spends the same
epoch on the classifier of the quantized network alone.

  python -m experiments.qwt
  python -m experiments.qwt --config=imagenet --workdir=DIR
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from experiments.harness import launcher
from experiments.harness.runs import Call, Run
from experiments.harness.settings import section
from experiments.protocols import compensation_tuning, post_training, quantized_networks
from experiments.protocols.compensation_tuning import FineTuning
from experiments.protocols.post_training import Further
from experiments.protocols.quantized_networks import Fitting, Method
from jaxlab.quantizers import compensation

# Other compensations that it may be compared with, by their defaults.
OTHERS = {'QwT-v2': compensation.QwTv2(), 'NBC': compensation.NBC()}
# Rows that are trained: title, role, the row that they start from.
TUNED = {'PTQ*': ('baseline', 'PTQ'), 'QwT*': ('method', 'QwT')}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(quantized_networks.Settings):
  """Settings of QwT.

  Attributes:
    qwt: the linear layers.
    fitting: how they are fitted.
    fine_tuning: of QwT* and PTQ*; None: neither.
    others: compensations that it is compared with.
  """

  qwt: compensation.QwT = section(compensation.QwT)
  fitting: Fitting = section(Fitting)
  fine_tuning: FineTuning | None = None
  others: tuple[Literal['QwT-v2', 'NBC'], ...] = ()


def methods(config: Settings) -> dict[str, Method]:
  """Returns the row of the closed form, and those of other compensations."""
  others = {title: Method('baseline', OTHERS[title]) for title in config.others}
  return {'QwT': Method('method', config.qwt, config.fitting), **others}


def tuned(config: Settings) -> dict[str, Further]:
  """Returns the rows that are trained: QwT*, and the classifier of the quantized network alone."""
  if config.fine_tuning is None:
    return {}
  return {
    title: compensation_tuning.row(
      config, config.fine_tuning, role, base, methods(config).get(base)
    )
    for title, (role, base) in TUNED.items()
  }


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from post_training.check(config, methods(config), TUNED)
  if config.fine_tuning is not None:
    yield from compensation_tuning.check(config, config.fine_tuning)


def programs(config: Settings, facts: None = None) -> dict[str, Run | Call]:
  """Returns the trainings of float networks, the pipeline of the first, and its fine-tuning, by name."""
  del facts
  found = quantized_networks.programs(config)
  if config.fine_tuning is not None:
    found |= compensation_tuning.programs(config, config.fine_tuning)
  return found


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Quantizes every network at every bit-width, with and without QwT."""
  return post_training.compare(config, workdir, methods(config), tuned(config))


if __name__ == '__main__':
  launcher.main('qwt')
