"""One module a paper: each composes the library's functions into the paper's experiment."""

import importlib.util
import os
import pathlib

from experiments import xla_flags

# A step that was compiled once is not compiled again when a run is resumed or repeated with another seed.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR', str(pathlib.Path.home() / '.cache' / 'jaxlab' / 'compiled')
)


def _only_cpu() -> bool:
  accelerators = ('libtpu', 'jax_cuda12_plugin', 'jax_cuda13_plugin', 'jax_rocm7_plugin')
  return not any(map(importlib.util.find_spec, accelerators))


def _prefer_eigen() -> None:
  """Lets XLA's CPU backend compute dots and convolutions by Eigen instead of YNNPACK.

  The gradient of a 3x3 convolution with respect to its kernel then takes a third of the time (64 channels,
  32 pixels); an XLA that does without YNNPACK stays as it is.
  """
  xla_flags.add(
    'xla_cpu_experimental_ynn_fusion_type',
    '-individual_dot,-individual_convolution',
    names='LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION',
  )


if _only_cpu():
  _prefer_eigen()
