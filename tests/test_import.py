import inspect
import re
import subprocess
import sys

import pytest

from jaxlab import (
  adapters,
  classifiers,
  compression,
  data,
  evaluation,
  localization,
  losses,
  models,
  parallel,
  quantizers,
  training,
)

ROOMS = (
  *(
    adapters,
    classifiers,
    compression,
    data,
    evaluation,
    localization,
    losses,
    models,
    parallel,
    quantizers,
    quantizers.compensation,
  ),
  training,
)

PROGRAM = """
import sys
from jaxlab import classifiers, data, evaluation, localization, losses, models, parallel, quantizers
from jaxlab import adapters, compression, training
heavy = {'tensorflow', 'tensorflow_datasets', 'sklearn', 'matplotlib', 'orbax', 'grain', 'torch', 'PIL'}
print(sorted(heavy & set(sys.modules)))
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""


def test_importing_every_room_starts_no_backend_and_loads_nothing_heavy():
  done = subprocess.run([sys.executable, '-c', PROGRAM], capture_output=True, text=True, check=True)
  assert done.stdout.splitlines() == ['[]', 'False']


@pytest.mark.parametrize('room', ROOMS, ids=lambda room: room.__name__)
def test_signatures_read_as_they_are_written(room):
  functions = [found for name in room.__all__ if inspect.isfunction(found := getattr(room, name))]
  assert functions
  expanded = {
    function.__name__
    for function in functions
    if re.search(r'Union\[|numpy\.number|object at 0x', str(inspect.signature(function)))
  }
  assert not expanded
