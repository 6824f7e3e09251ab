import functools
import gc
import importlib.metadata
import itertools
import os
import threading

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Tests compile much and compute little. Without LLVM's optimizations they compile three times as fast,
# without MLIR's fusion emitters twice as fast again (an XLA that does not know these flags would abort).
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + ' --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  + ' --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
  * (importlib.metadata.version('jaxlib') == '0.10.2')
)
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR', os.path.join(os.path.dirname(__file__), '..', '.jax_cache')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')
os.environ.setdefault('JAX_TRACEBACK_IN_LOCATIONS_LIMIT', '0')

import jax
import pytest
from golden_vectors import Vectors

# Before any backend starts: it adds compiler flags, which processes started by tests inherit.
import experiments  # noqa: F401

if jax.__version__ == '0.10.2':
  # Most programs of the tests are single operations, and a fourth of their compilation goes into a fresh MLIR
  # context with all its dialects. 64 programs of a thread share one; for ever, it would keep the constants of
  # all.
  from jax._src.interpreters import mlir

  _context = functools.lru_cache(1)(lambda *_, new=mlir.make_ir_context: new())
  _programs = itertools.count()
  mlir.make_ir_context = lambda: _context(threading.get_ident(), next(_programs) // 64)

# Traces are many small objects that live on: to look through them often costs a tenth of the time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def vectors(request) -> Vectors:
  """The arrays of one reference file (see `golden_vectors.golden`)."""
  return Vectors(request.param)
