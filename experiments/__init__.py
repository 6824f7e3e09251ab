"""One module a paper: each composes the library's functions into the paper's experiment."""

import importlib.metadata
import importlib.util
import os
import pathlib

# A step that was compiled once is not compiled again when a run is resumed or repeated with another seed.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR', str(pathlib.Path.home() / '.cache' / 'jaxlab' / 'compiled')
)


def _prefer_eigen() -> None:
  """Lets XLA's CPU backend compute dots and convolutions by Eigen instead of YNNPACK.

  The gradient of a 3x3 convolution with respect to its kernel then takes a third of the time (64 channels,
  32 pixels), a step of ResNet-18 half. An XLA that does not know the flag would abort, so it is set only
  where it was tried, and only where there is nothing but a CPU.
  """
  accelerators = ('libtpu', 'jax_cuda12_plugin', 'jax_cuda13_plugin', 'jax_rocm7_plugin')
  only_cpu = not any(map(importlib.util.find_spec, accelerators))
  flag = '--xla_cpu_experimental_ynn_fusion_type'
  flags = os.environ.get('XLA_FLAGS', '')
  if only_cpu and importlib.metadata.version('jaxlib') == '0.10.2' and flag not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {flag}=-individual_dot,-individual_convolution'.strip()


_prefer_eigen()
