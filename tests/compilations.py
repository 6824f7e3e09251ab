"""Which functions a test compiles."""

import contextlib
from collections import Counter
from collections.abc import Iterator

import jax

COMPILED = '/jax/core/compile/backend_compile_duration'


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
  """Yields how often each jitted function is compiled, or loaded from the compilation cache, inside.

  Names are those of the functions. (`_cache_size()` of a jitted function forgets what many other calls have
  pushed out of a cache that all functions share.)
  """
  found: Counter = Counter()

  def listen(name: str, *args, **kwargs) -> None:
    if name == COMPILED:
      found[kwargs.get('fun_name', '').removeprefix('jit(').removesuffix(')')] += 1

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
