import os
import re
import signal
import subprocess
import sys

import jax
import pytest
from small_program import CONFIG, Data, make_program

from jaxlab.training import fit, locked

HOLD = """
import os, sys
from jaxlab.training import locked
with locked(sys.argv[1]):
  print(os.getpid(), flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
  """Another process, which holds the directory."""
  command = [sys.executable, '-c', HOLD, str(tmp_path)]
  pipe = subprocess.PIPE
  process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
  process.stdout.readline()
  yield process
  process.kill()
  process.communicate()


def run(workdir):
  return fit(
    make_program(), Data(), num_steps=1, key=jax.random.key(0), workdir=str(workdir), config=CONFIG
  )


def test_the_second_process_is_told_who_holds_the_directory(tmp_path, holder):
  with pytest.raises(ValueError) as error:
    run(tmp_path)
  message = (
    rf"workdir='{re.escape(str(tmp_path))}' is in use by process {holder.pid} on \S+, since 20"
  )
  assert re.match(message, str(error.value))
  assert os.listdir(tmp_path) == ['.lock']
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  run(tmp_path)  # a dead process holds nothing


def test_the_directory_is_free_after_the_block(tmp_path):
  for _ in range(2):
    with locked(tmp_path):
      pass
    with pytest.raises(KeyError), locked(tmp_path):
      raise KeyError
  with (
    locked(tmp_path),
    pytest.raises(ValueError, match=f'process {os.getpid()} '),
    locked(tmp_path),
  ):
    pytest.fail('taken twice')


def test_buckets_are_not_locked():
  with locked('gs://nobody/nothing'):
    pass


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / 'file').touch()
  taken = pytest.raises(ValueError, match=r"workdir='.*file/run' cannot be written")
  with taken, locked(tmp_path / 'file' / 'run'):
    pass
