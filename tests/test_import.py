import subprocess
import sys

PROGRAM = """
import sys
from jaxlab import classifiers, data, evaluation, losses, models, parallel, quantizers, training
heavy = {'tensorflow', 'tensorflow_datasets', 'sklearn', 'matplotlib', 'orbax', 'grain', 'torch', 'PIL'}
print(sorted(heavy & set(sys.modules)))
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""


def test_importing_every_room_starts_no_backend_and_loads_nothing_heavy():
  done = subprocess.run([sys.executable, '-c', PROGRAM], capture_output=True, text=True, check=True)
  assert done.stdout.splitlines() == ['[]', 'False']
