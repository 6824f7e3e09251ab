"""One module a paper: each composes the library's functions into the paper's experiment."""

import ctypes
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


def _keep_memory() -> None:
  """Lets glibc keep what XLA frees, for the next step.

  A compiled step on a CPU allocates its hundreds of megabytes anew at each call; given back to the system in
  between, they cost a page fault for every 4 kB: a tenth of the step of a vision transformer.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError):  # another C library
    return
  trim_threshold, mmap_max, arena_max = -1, -4, -8
  mallopt(mmap_max, 0)
  mallopt(trim_threshold, 2**31 - 1)
  mallopt(arena_max, 1)  # the arenas of other threads hold no more than 64 MB


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
  _keep_memory()
