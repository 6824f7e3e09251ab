"""Features over a socket: all arrives as it was sent and counted, or nothing is kept."""

import json
import re
import socket
import struct
import threading
import time

import numpy as np
import pytest

from jaxlab import data
from jaxlab.data import transfer

HEADER = data.FeatureHeader(
  network='a', data='b', layers='0', shape=(3, 4), dtype='float16', count=150, num_classes=5
)


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
  folder, rng = tmp_path_factory.mktemp('cloud'), np.random.default_rng(0)
  found = {}
  for name in ('train', 'test'):
    features = rng.standard_normal((150, 3, 4)).astype(np.float16)
    labels = rng.integers(0, 5, 150)
    path = folder / f'{name}.npz'
    data.write_feature_file(path, data.in_batches(features, labels), HEADER)
    found[name] = data.FeatureFile(path)
  return found


class Server:
  """Something that answers one connection in a thread of its own."""

  def __init__(self, serve):
    self.result, self.error = None, None
    self._server = socket.create_server(('127.0.0.1', 0))
    self.port = self._server.getsockname()[1]

    def run():
      try:
        self.result = serve(self._server)
      except Exception as error:
        self.error = error

    self._thread = threading.Thread(target=run)
    self._thread.start()

  def join(self):
    self._thread.join(30)
    self._server.close()
    assert not self._thread.is_alive()


def raw(payload):
  """Returns a server of these bytes."""

  def serve(server):
    connection, _ = server.accept()
    with connection:
      connection.sendall(payload)

  return serve


def wire(sets):
  """Returns all bytes of a transfer, as a device sees them."""
  server = Server(lambda own: data.send_features(own, sets))
  with socket.create_connection(('127.0.0.1', server.port)) as connection:
    parts = []
    while part := connection.recv(1 << 16):
      parts.append(part)
  server.join()
  assert server.error is None
  return b''.join(parts), server.result


def test_messages_are_bounded_by_their_bytes(sets, tmp_path, monkeypatch):
  monkeypatch.setattr(transfer, 'MAX_MESSAGE', 7 * (HEADER.record_bytes + 4) + 3)
  whole, _ = wire(sets)
  at, sizes = 0, []
  while at < len(whole):
    (size,) = struct.unpack('>Q', whole[at : at + 8])
    sizes.append(size)
    at += 8 + size
  assert sizes.count(7 * (HEADER.record_bytes + 4)) == 2 * (150 // 7)
  server = Server(raw(whole))
  files, received = data.receive_features('127.0.0.1', server.port, tmp_path)
  server.join()
  assert received == len(whole)
  for name, path in files.items():
    rows = [own.gather(np.arange(150)) for own in (data.FeatureFile(path), sets[name])]
    np.testing.assert_array_equal(rows[0]['features'], rows[1]['features'])


@pytest.mark.parametrize('suffix', ['.npz', '.array_record'])
def test_all_arrives_and_bytes_are_counted_on_both_sides(sets, tmp_path, suffix):
  server = Server(lambda own: data.send_features(own, sets))
  files, received = data.receive_features('127.0.0.1', server.port, tmp_path, suffix=suffix)
  server.join()
  assert server.result == received
  for name, path in files.items():
    found = data.FeatureFile(path)
    assert found.header == HEADER
    everything = np.arange(150)
    for key in ('features', 'label'):
      np.testing.assert_array_equal(
        found.gather(everything)[key], sets[name].gather(everything)[key]
      )
  payload = 2 * 150 * (HEADER.record_bytes + 4)
  assert payload < received < payload + 2000
  assert sorted(path.name for path in tmp_path.iterdir()) == [f'test{suffix}', f'train{suffix}']


def test_a_connection_that_closes_in_the_middle_leaves_nothing(sets, tmp_path):
  whole, sent = wire(sets)
  assert len(whole) == sent
  kept = tmp_path / 'train.npz'
  kept.write_bytes(b'of before')
  for length in (0, 5, 20, 400, len(whole) // 2, len(whole) - 1):
    server = Server(raw(whole[:length]))
    with pytest.raises(ConnectionError, match=r'closed .* nothing of it was kept'):
      data.receive_features('127.0.0.1', server.port, tmp_path)
    server.join()
    assert [path.name for path in tmp_path.iterdir()] == ['train.npz']
    assert kept.read_bytes() == b'of before'


def test_bytes_that_were_damaged_are_noticed(sets, tmp_path):
  whole = bytearray(wire(sets)[0])
  place = whole.index(sets['test'].gather(np.arange(3))['features'].tobytes())
  whole[place + 1] ^= 0x01
  server = Server(raw(whole))
  with pytest.raises(ConnectionError, match='checksum'):
    data.receive_features('127.0.0.1', server.port, tmp_path)
  server.join()
  assert not list(tmp_path.iterdir())


def message(payload):
  return struct.pack('>Q', len(payload)) + payload


def announced(name='train', **changes):
  header = {**json.loads(HEADER.to_json()), **changes}
  return message(json.dumps({'name': name, 'header': json.dumps(header)}).encode())


@pytest.mark.parametrize(
  'payload, expected',
  [
    (b'HTTP/1.1 400 Bad Request\r\n\r\n', 'a message of .* bytes came'),
    (message(b'jaxlab features 9'), 'no cloud of features of this version'),
    (message(transfer.GREETING) + message(b'[1]'), 'announced as it cannot be'),
    (message(transfer.GREETING) + announced('../../evil'), 'letters, digits'),
    (message(transfer.GREETING) + announced(dtype='object'), "dtype='object'"),
    (message(transfer.GREETING) + announced(shape=[3, 4, 1]), 'tokens, width'),
    (message(transfer.GREETING) + announced(shape=[3.5, 4]), 'expected integers'),
    (message(transfer.GREETING) + announced(num_prefix_tokens=3), 'expected 0 to 2'),
    (message(transfer.GREETING) + announced(shape=[1 << 20, 1 << 20]), 'bytes was announced'),
    (message(transfer.GREETING) + announced() + message(b'short'), 'a message of 5 bytes came'),
  ],
)
def test_what_is_not_the_protocol_is_refused(tmp_path, payload, expected):
  server = Server(raw(payload))
  with pytest.raises(ConnectionError, match=expected):
    data.receive_features('127.0.0.1', server.port, tmp_path)
  server.join()
  assert not list(tmp_path.iterdir())


def test_clouds_and_devices_that_are_not_there_are_told(sets, tmp_path):
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
  with pytest.raises(ConnectionError, match=f'127.0.0.1:{port}'):
    data.receive_features('127.0.0.1', port, tmp_path)
  with pytest.raises(ConnectionError, match='gathers or serves another device'):
    data.receive_features('127.0.0.1', port, tmp_path)
  with data.listening() as server, pytest.raises(ConnectionError, match='not sent'):
    data.send_features(server, sets, timeout=0.1)
  with data.listening() as server, pytest.raises(ValueError, match='names of sets'):
    data.send_features(server, {'a/b': sets['train']})


def test_values_that_are_not_finite_do_not_arrive(tmp_path):
  class Broken:
    header = HEADER

    def batches(self, size):
      yield from data.in_batches(np.full((150, 3, 4), np.nan), np.zeros(150, int), size)

  # Who refuses them has left within the first set: another device is waited for.
  server = Server(lambda own: data.send_features(own, {'train': Broken()}, timeout=2.0))
  with pytest.raises(ValueError, match='not finite'):
    data.receive_features('127.0.0.1', server.port, tmp_path)
  server.join()
  assert not list(tmp_path.iterdir())


class Waiting:
  """Features whose records come once they are asked for by `go`."""

  header = HEADER

  def __init__(self, features):
    self._features, self.begun, self.go = features, threading.Event(), threading.Event()

  def batches(self, size):
    self.begun.set()
    assert self.go.wait(30)
    yield from self._features.batches(size)


def test_a_second_device_is_refused_at_once_while_the_first_is_served(sets, tmp_path):
  slow = Waiting(sets['train'])
  server = Server(lambda own: data.send_features(own, {'train': slow}))
  found = []
  first = threading.Thread(
    target=lambda: found.append(data.receive_features('127.0.0.1', server.port, tmp_path / 'a'))
  )
  first.start()
  assert slow.begun.wait(30)
  with pytest.raises(ConnectionError, match=r'after 0 bytes.* serves another device'):
    data.receive_features('127.0.0.1', server.port, tmp_path / 'b', timeout=5.0)
  assert not found
  slow.go.set()
  first.join(30)
  server.join()
  assert found[0][1] == server.result


def test_who_leaves_within_the_first_set_was_no_device(sets, tmp_path):
  sent = []
  with data.listening() as server:
    place = server.getsockname()
    socket.create_connection(place).close()
    thread = threading.Thread(target=lambda: sent.append(data.send_features(server, sets)))
    thread.start()
    deadline = time.monotonic() + 30
    while True:
      try:
        _, received = data.receive_features(*place, tmp_path)
        break
      except ConnectionError:  # the probe is still served
        assert time.monotonic() < deadline
        time.sleep(0.01)
    thread.join(30)
  assert sent == [received] and data.FeatureFile(tmp_path / 'train.npz').header == HEADER


def test_who_reads_nothing_is_not_taken_for_a_device_although_all_fits_on_its_way(sets):
  with data.listening() as server:
    probe = socket.create_connection(server.getsockname())
    leave = threading.Timer(0.3, probe.close)  # by then all is on its way
    leave.start()
    with pytest.raises(ConnectionError, match='left before it had read all'):
      data.send_features(server, {'train': sets['train']}, timeout=30.0)


def test_who_gave_up_before_is_passed_over_without_a_word_to_who_waits(sets, tmp_path):
  with data.listening() as server:
    place, found = server.getsockname(), []
    for _ in range(3):
      socket.create_connection(place).close()
    device = threading.Thread(
      target=lambda: found.append(data.receive_features(*place, tmp_path, timeout=30.0))
    )
    device.start()
    time.sleep(0.2)  # it waits behind the others
    sent = data.send_features(server, sets, timeout=30.0)
    device.join(30)
  assert found[0][1] == sent


def test_what_a_killed_process_received_does_not_stand_in_the_way(sets, tmp_path):
  (tmp_path / 'arriving.partial').mkdir()
  (tmp_path / 'arriving.partial' / 'train.npz').write_bytes(b'of before')
  server = Server(lambda own: data.send_features(own, sets))
  data.receive_features('127.0.0.1', server.port, tmp_path)
  server.join()
  assert sorted(path.name for path in tmp_path.iterdir()) == ['test.npz', 'train.npz']


def test_addresses_that_cannot_be_waited_at_are_told():
  with data.listening() as server:
    port = server.getsockname()[1]
    for host, own in (('127.0.0.1', port), ('127.0.0.1', 99999), ('no.such.host.invalid', 0)):
      message = re.escape(f'{host}:{own}: no device can be waited for')
      with pytest.raises(ConnectionError, match=message), data.listening(host, own):
        pass
