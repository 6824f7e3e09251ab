"""Starting on several hosts: the same command on each, one program over all of them."""

import glob
import importlib.util
import os
import urllib.error
import urllib.request

import jax

_METADATA_URL = 'http://{}/computeMetadata/v1/instance/attributes/worker-network-endpoints'


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Connects this process with its peers, if there are any. Call it before anything else of jax.

  With an address, given here or in `JAX_COORDINATOR_ADDRESS` (then also `JAX_NUM_PROCESSES` and
  `JAX_PROCESS_ID`), it calls `jax.distributed.initialize` with it. Without one it looks for a TPU pod:
  more than one worker or slice in the environment, or in the metadata of the virtual machine. On a
  single host it does nothing, nor where it has done so already. On the CPU backend, collectives between
  processes go through gloo.

  Args:
    coordinator_address: `host:port` of process 0.
    num_processes: how many processes there are.
    process_id: which one this is, from 0.

  Raises:
    ValueError: if only a part of the three is given.
  """
  if jax.distributed.is_initialized():
    return
  given = {
    'coordinator_address': coordinator_address or os.environ.get('JAX_COORDINATOR_ADDRESS'),
    'num_processes': _number(num_processes, 'JAX_NUM_PROCESSES'),
    'process_id': _number(process_id, 'JAX_PROCESS_ID'),
  }
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    if on_pod():
      jax.distributed.initialize()
    return
  if missing:
    raise ValueError(
      f'Several hosts: {", ".join(missing)} missing. Give all of {", ".join(given)}, or none on a '
      'single host and on a TPU pod.'
    )
  if not 0 <= given['process_id'] < given['num_processes']:
    raise ValueError(
      f'process_id={given["process_id"]} is not in 0 .. num_processes - 1 = '
      f'{given["num_processes"] - 1}.'
    )
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(**given)


def on_pod() -> bool:
  """Returns whether this is one of several hosts of a TPU pod."""
  workers = os.environ.get('TPU_WORKER_HOSTNAMES')
  if int(os.environ.get('MEGASCALE_NUM_SLICES', '1')) > 1:
    return True
  if workers is None and _has_tpu():
    workers = _workers_in_metadata()
  return len((workers or '').split(',')) > 1


def is_primary() -> bool:
  """Returns whether this is the process that writes metrics, results and pictures."""
  return jax.process_index() == 0


def _number(value: int | None, variable: str) -> int | None:
  text = os.environ.get(variable)
  return int(text) if value is None and text is not None else value


def _has_tpu() -> bool:
  """Returns whether TPU chips are attached; does not start a backend."""
  chips = glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*')
  return bool(chips) and importlib.util.find_spec('libtpu') is not None


def _workers_in_metadata() -> str:
  """Returns the pod's workers, comma-separated, from the cloud's metadata server; '' if none answers."""
  host = os.environ.get('GCE_METADATA_IP', 'metadata.google.internal')
  request = urllib.request.Request(
    _METADATA_URL.format(host), headers={'Metadata-Flavor': 'Google'}
  )
  try:
    with urllib.request.urlopen(request, timeout=3) as answer:
      return answer.read().decode()
  except (urllib.error.URLError, OSError):
    return ''
