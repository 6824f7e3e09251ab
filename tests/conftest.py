import gc
import os
import threading

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR', os.path.join(os.path.dirname(__file__), '..', '.jax_cache')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')
os.environ.setdefault('JAX_TRACEBACK_IN_LOCATIONS_LIMIT', '0')

import pytest
from golden_vectors import Vectors

# Before any backend starts: it adds compiler flags, which processes started by tests inherit.
from experiments.harness import xla_flags

xla_flags.add('xla_force_host_platform_device_count', '8')
# Tests compile much and compute little. Without LLVM's optimizations they compile three times as fast,
# without MLIR's fusion emitters (where XLA can still do without them) twice as fast again.
xla_flags.add('xla_backend_optimization_level', '0')
xla_flags.add('xla_cpu_use_fusion_emitters', 'false')
xla_flags.add('xla_cpu_parallel_codegen_split_count', '1')

# Traces are many small objects that live on: to look through them often costs a tenth of the time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope='session', autouse=True)
def arrays_are_saved_whole():
  """Orbax splits what the eight devices hold alike among them: a program to compile for each piece."""
  import jax
  from orbax.checkpoint import type_handlers

  handler = type_handlers.ArrayHandler(use_replica_parallel=False)
  type_handlers.register_type_handler(jax.Array, handler, override=True)


@pytest.fixture(scope='session', autouse=True)
def programs_share_contexts():
  """Lowers a hundred programs in one MLIR context (JAX itself does one, from 0.12 on ten).

  Each program lives on in JAX's caches with its context, and to make a context, as every compilation does,
  looks at all that are alive: behind some thousands of programs, another took several times as long.
  """
  from jax._src.interpreters import mlir

  found, own = mlir.make_ir_context, threading.local()
  create = getattr(mlir, '_create_ir_context', found)

  def shared():
    own.left = getattr(own, 'left', 0) - 1
    if own.left < 0:
      own.context, own.left = create(), 99
    return own.context

  mlir.make_ir_context = shared
  yield
  mlir.make_ir_context = found


@pytest.fixture
def vectors(request) -> Vectors:
  """The arrays of one reference file (see `golden_vectors.golden`)."""
  return Vectors(request.param)
