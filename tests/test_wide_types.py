import os
import pathlib
import subprocess
import sys


def test_public_functions_keep_float32_where_the_default_types_have_64_bits():
  script = pathlib.Path(__file__).with_name('wide_calls.py')
  environment = {**os.environ, 'JAX_ENABLE_X64': '1', 'PYTHONPATH': str(script.parents[1])}
  done = subprocess.run(
    [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == ''
