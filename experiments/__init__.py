"""One module a paper: each composes the library's functions into the paper's experiment.

>>> import experiments  # before jax computes anything: it sets compiler flags
>>> results = experiments.run('gml', workdir='runs/gml', **{'network.epochs': 3})  # doctest: +SKIP
"""

import importlib.util
import os
import pathlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from experiments.harness import xla_flags


def run(
  paper: str,
  setting: str = 'embedded',
  *,
  workdir: str | os.PathLike | None = None,
  seeds: Sequence[int] | None = None,
  **changes: Any,
) -> Any:
  """Does what `python -m experiments.PAPER` does, and returns the results.

  Settings are filled in and checked before anything is trained. What was trained before in the same work
  directory is not trained again.

  Args:
    paper: name of the module in `experiments`.
    setting: name of a setting of the paper, or a path; `python -m experiments list PAPER` shows them.
    workdir: for results, pictures and checkpoints; default: `runs/<paper>/<setting>/seed<seed>`.
    seeds: run all of them, a folder a seed, and return their means and deviations.
    **changes: entries of the settings, as in `seed=1` or `**{'network.epochs': 3}`.

  Returns:
    The results, a dict as in `results.json` (`results['rows']`). `print` shows table and verdicts, a
    notebook the pictures as well.

  Raises:
    ValueError: for a paper, settings or a work directory that cannot be; all that is wrong is listed.
    FileNotFoundError: for data that are not there; the message says how to get them.
    KeyboardInterrupt: when it is interrupted, after a training has been saved.
  """
  from experiments.harness import launcher

  return launcher.run(paper, setting, workdir=workdir, seeds=seeds, overrides=changes)


def settings(paper: str, setting: str = 'embedded', **changes: Any) -> Any:
  """Returns what `run` would run with, filled in and checked; `print` shows an entry a line.

  Raises:
    ValueError: as `run` does.
  """
  from experiments.harness import launcher

  return launcher.load_checked(paper, setting, changes)


def _only_cpu() -> bool:
  accelerators = ('libtpu', 'jax_cuda12_plugin', 'jax_cuda13_plugin', 'jax_rocm7_plugin')
  return not any(map(importlib.util.find_spec, accelerators))


def _prefer_eigen() -> bool:
  """Lets XLA's CPU backend compute dots and convolutions by Eigen instead of YNNPACK.

  The gradient of a 3x3 convolution with respect to its kernel then takes a third of the time (64 channels,
  32 pixels); an XLA that does without YNNPACK stays as it is.

  Returns:
    Whether a flag was set.
  """
  return xla_flags.add(
    'xla_cpu_experimental_ynn_fusion_type',
    '-individual_dot,-individual_convolution',
    names='LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION',
  )


def _has_computed() -> bool:
  """Returns whether jax has started a backend in this process: XLA has read its flags then."""
  if 'jax' not in sys.modules:
    return False
  import jax

  devices = jax.config.jax_num_cpu_devices
  try:  # an option that cannot be changed afterwards
    jax.config.update('jax_num_cpu_devices', 1 if devices != 1 else 2)
  except RuntimeError:
    return True
  jax.config.update('jax_num_cpu_devices', devices)
  return False


def _keep_compiled() -> None:
  """Keeps compiled programs on disk: another seed, or a run that goes on, does not compile them again."""
  folder = str(pathlib.Path.home() / '.cache' / 'jaxlab' / 'compiled')
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', folder)
  if 'jax' in sys.modules:  # it has read the environment already
    import jax

    if jax.config.jax_compilation_cache_dir is None:
      jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])


_keep_compiled()
if _only_cpu() and _prefer_eigen() and _has_computed():
  warnings.warn(
    'jax has computed something before `import experiments`, so that XLA does not read the flags that make '
    'training on a CPU faster: restart Python and import experiments first.',
    stacklevel=2,
  )
