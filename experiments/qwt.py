"""QwT: Quantization without Tears (Fu et al., CVPR 2025, arXiv 2411.13918).

Behind every block of a quantized network stands a small linear layer that predicts, from the block's input,
the error the quantized block makes: least squares, solved in closed form on 512 unlabeled inputs. Claim: it
recovers a clear part of what post-training quantization loses at few bits, and costs nothing at many. QwT*
goes on from there for an epoch of gradient steps on these layers and the classifier; PTQ* spends the same
epoch on the classifier of the quantized network alone.

  python -m experiments.qwt
  python -m experiments.qwt --config=mlcollections_configs/qwt/imagenet.py --workdir=DIR
"""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from experiments import launcher, post_training
from experiments.compensation_tuning import Tuning
from experiments.post_training import Method
from jaxlab.quantizers import compensation

lower = post_training.lower


def methods(config: ConfigDict) -> dict[str, Method]:
  """Returns the rows of the comparison behind float and quantization alone."""
  return {'QwT': Method('method', compensation.QwT(**config.qwt.method), config.qwt.options)}


def tunings(config: ConfigDict) -> dict[str, Tuning]:
  """Returns the rows that are trained for `config.qwt.fine_tuning`: QwT*, and its classifier alone."""
  settings = config.qwt.get('fine_tuning')
  if settings is None:
    return {}
  return {'PTQ*': Tuning('baseline', 'PTQ', settings), 'QwT*': Tuning('method', 'QwT', settings)}


def run(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Quantizes every network at every bit-width, with and without QwT."""
  return post_training.compare(config, workdir, methods(config), tunings(config))


if __name__ == '__main__':
  launcher.main(run, 'qwt')
