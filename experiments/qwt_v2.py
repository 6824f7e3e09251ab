"""QwT-v2 (Tang et al. 2025, arXiv 2505.20932): a scale and a shift for every output channel.

The output of every quantized layer is compensated by two numbers a channel, in closed form. An integer engine
multiplies each channel by a scale and adds a bias anyway, so that the compensation melts into its constants.
Claim: it matches QwT (here: it is better than quantization alone at few bits) for a fraction of its
parameters and, folded into the layers, at no cost.

  python -m experiments.qwt_v2
"""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from experiments import launcher, post_training, qwt
from experiments.post_training import Method
from jaxlab.quantizers import compensation

lower = post_training.lower


def methods(config: ConfigDict) -> dict[str, Method]:
  """Returns the rows of the comparison: QwT-v2 with each teacher, at the block's output, and QwT."""
  own = config.qwt_v2
  rows = {'QwT-v2': Method('method', compensation.QwTv2(**own.method), own.options)}
  for title, changes in own.variants.items():
    settings = compensation.QwTv2(**{**own.method, **changes.get('method', {})})
    rows[title] = Method('reference', settings, {**own.options, **changes.get('options', {})})
  return rows | {'QwT': qwt.methods(config)['QwT']._replace(role='reference')}


def run(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Quantizes every network at every bit-width, alone, with QwT-v2 and with QwT."""
  return post_training.compare(config, workdir, methods(config))


if __name__ == '__main__':
  launcher.main(run, 'qwt_v2')
