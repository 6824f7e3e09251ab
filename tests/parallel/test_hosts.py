import jax
import pytest

from jaxlab.parallel import hosts

VARIABLES = (
  'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID', 'TPU_WORKER_HOSTNAMES',
  'MEGASCALE_NUM_SLICES',
)  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
  """What `jax.distributed.initialize` is called with."""
  for name in VARIABLES:
    monkeypatch.delenv(name, raising=False)
  seen = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda **options: seen.append(options))
  monkeypatch.setattr(hosts, '_has_tpu', lambda: False)
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)
  return seen


def test_single_host_starts_nothing(calls, monkeypatch):
  hosts.initialize()
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'localhost')
  hosts.initialize()
  assert calls == []
  assert hosts.is_primary()


@pytest.mark.parametrize(
  'name, value', [('TPU_WORKER_HOSTNAMES', 'host0,host1'), ('MEGASCALE_NUM_SLICES', '2')]
)
def test_pod_is_detected_from_the_environment(calls, monkeypatch, name, value):
  monkeypatch.setenv(name, value)
  hosts.initialize()
  assert calls == [{}]


@pytest.mark.parametrize('workers, started', [('a:1,b:2', [{}]), ('a:1', []), ('', [])])
def test_pod_is_detected_from_the_machine_metadata(calls, monkeypatch, workers, started):
  monkeypatch.setattr(hosts, '_has_tpu', lambda: True)
  monkeypatch.setattr(hosts, '_workers_in_metadata', lambda: workers)
  hosts.initialize()
  assert calls == started


def test_processes_are_taken_from_arguments_or_environment(calls, monkeypatch):
  given = {'coordinator_address': 'host:1', 'num_processes': 2, 'process_id': 1}
  hosts.initialize(**given)
  for name, value in zip(VARIABLES[:3], given.values(), strict=True):
    monkeypatch.setenv(name, str(value))
  hosts.initialize()
  assert calls == [given, given]


def test_a_second_call_does_nothing(calls, monkeypatch):
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'a,b')
  hosts.initialize()
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  hosts.initialize()
  assert len(calls) == 1


def test_partial_or_wrong_processes_are_refused(calls):
  with pytest.raises(ValueError, match='num_processes, process_id missing'):
    hosts.initialize('host:1')
  with pytest.raises(ValueError, match='process_id=2 is not in 0'):
    hosts.initialize('host:1', 2, 2)
  assert calls == []
