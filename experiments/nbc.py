"""NBC: Nonlinear Bipolar Compensation (Sun and Wu 2026, arXiv 2605.16423).

QwT's linear layer between sign-preserving logarithms of the block's input and of its error: nonlinear, fitted
in closed form, and not ruled by the few huge activations of transformers. Claim: level with QwT on clean
networks, and better where there are outliers. The abstract fixes the structure; the transformation
`sign(x) ln(1 + |x| / s)` is this library's choice.

  python -m experiments.nbc
"""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from experiments import launcher, post_training, qwt
from experiments.post_training import Method
from jaxlab.quantizers import compensation

lower = post_training.lower


def methods(config: ConfigDict) -> dict[str, Method]:
  """Returns the rows of the comparison: NBC, its variants (other rules for the scales), and QwT."""
  own = config.nbc
  rows = {'NBC': Method('method', compensation.NBC(**own.method), own.options)}
  for title, changes in own.variants.items():
    rows[title] = Method('reference', compensation.NBC(**{**own.method, **changes}), own.options)
  return rows | {'QwT': qwt.methods(config)['QwT']._replace(role='baseline')}


def run(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Quantizes every network at every bit-width, alone, with NBC and with QwT."""
  return post_training.compare(config, workdir, methods(config))


if __name__ == '__main__':
  launcher.main(run, 'nbc')
