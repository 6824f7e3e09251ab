"""Features over a socket: a cloud that has a network sends them to a device that has none, one way.

A connection carries, in this order and with a length of 8 bytes (big-endian) before each message: the
greeting; for every set of records its name and header (JSON), its batches (labels as little-endian int32,
then features as little-endian floats), and a checksum of them; the farewell. Nothing is pickled, nothing is
sent back.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import socket
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from jaxlab.data.sources.feature_file import Batch, FeatureHeader, write_feature_file

GREETING, FAREWELL = b'jaxlab features 2', b'all'
MAX_TEXT = 1 << 20
MAX_RECORD = 1 << 28
BATCH = 64  # records of a message, fewer where these would exceed MAX_MESSAGE bytes
MAX_MESSAGE = 1 << 26
LAST_PORT = 65535


class Features(Protocol):
  """What can be sent: a `FeatureFile`, for one."""

  header: FeatureHeader

  def batches(self, size: int) -> Iterator[Batch]:
    """Yields features and labels, `size` records at a time."""


def parse_address(text: str) -> tuple[str, int]:
  """Returns host and port of `host:port`; raises ValueError for what is none.

  >>> parse_address('127.0.0.1:7000')
  ('127.0.0.1', 7000)
  """
  parts = re.fullmatch(r'(.+):(\d{1,5})', text)
  if parts is None or int(parts[2]) > LAST_PORT:
    raise ValueError(
      f'{text!r}: expected host:port, such as 127.0.0.1:7000, with a port of 0 to {LAST_PORT}.'
    )
  return parts[1], int(parts[2])


@contextlib.contextmanager
def listening(host: str = '127.0.0.1', port: int = 0) -> Iterator[socket.socket]:
  """Yields a socket that waits for a device; `getsockname()` says where. Port 0: any free one.

  The default is this machine alone: nothing is encrypted, and whoever connects is served.

  Raises:
    ConnectionError: if the address is none of this machine, or in use.
  """
  try:
    server = socket.create_server((host, port))
  except (OSError, OverflowError) as error:
    raise ConnectionError(
      f'{host}:{port}: no device can be waited for ({error}); expected an address of this machine and a '
      'free port.'
    ) from error
  with server:
    yield server


def send_features(
  server: socket.socket, sets: Mapping[str, Features], *, timeout: float = 60.0
) -> int:
  """Waits for one device, sends it all sets, and returns the bytes on the wire.

  Who connects meanwhile is refused. Who goes away within the first set, such as a probe of the port, was no
  device: another one is waited for. Where all fits on its way at once, that is seen at the end, and an error.

  Args:
    server: see `listening`; it is closed as soon as somebody connects.
    sets: by name: letters, digits, `_` and `-`.
    timeout: seconds that a connection, or a device that reads nothing, is waited for.

  Raises:
    ValueError: for other names, before anything is sent.
    ConnectionError: if the device is not there, goes away or stops reading.
  """
  for name in sets:
    _require_name(name)
  place, sent = server.getsockname()[:2], _Sent()
  try:
    while True:
      with server:
        server.settimeout(timeout)
        connection = _next_peer(server)
      try:
        with connection:
          connection.settimeout(timeout)
          sent = _Sent(connection)
          _send_sets(sent, sets)
          _require_read(connection)
        return sent.count
      except (BrokenPipeError, ConnectionResetError, ConnectionAbortedError):
        if sent.sets:
          raise
      server = socket.create_server(place)
  except OSError as error:  # timeouts and broken pipes are
    raise ConnectionError(f'features were not sent, {sent.count} bytes were: {error}.') from error


def _next_peer(server: socket.socket) -> socket.socket:
  """Returns the first connection that is still open: who gave up waiting is passed over."""
  while True:
    connection, _ = server.accept()
    connection.setblocking(False)
    try:
      closed = connection.recv(1, socket.MSG_PEEK) == b''
    except BlockingIOError:  # open, and nothing is sent to a cloud
      return connection
    except ConnectionError:
      closed = True
    if not closed:
      return connection
    connection.close()


def _require_read(connection: socket.socket) -> None:
  """Raises ConnectionError unless the other side closes behind the last byte: what is sent may lie unread."""
  try:
    connection.recv(1)
  except ConnectionError as error:
    raise ConnectionError('the device left before it had read all') from error


class _Sent:
  """Messages to a connection, their bytes counted, and the sets that are through."""

  def __init__(self, connection: Any = None):
    self.connection, self.count, self.sets = connection, 0, 0

  def message(self, payload: bytes) -> None:
    """Sends a message."""
    for part in (struct.pack('>Q', len(payload)), payload):
      self.connection.sendall(part)
      self.count += len(part)


def _send_sets(sent: _Sent, sets: Mapping[str, Features]) -> None:
  sent.message(GREETING)
  for name, features in sets.items():
    sent.message(json.dumps({'name': name, 'header': features.header.to_json()}).encode())
    check = 0
    for own, labels in features.batches(_message_records(features.header)):
      payload = labels.astype('<i4').tobytes() + own.astype(features.header.wire_dtype).tobytes()
      check = zlib.crc32(payload, check)
      sent.message(payload)
    sent.message(struct.pack('>I', check))
    sent.sets += 1
  sent.message(FAREWELL)
  sent.connection.shutdown(socket.SHUT_WR)


def _message_records(header: FeatureHeader) -> int:
  """Returns the records of a message; both sides compute it."""
  return max(1, min(BATCH, MAX_MESSAGE // (header.record_bytes + 4)))


def receive_features(
  host: str,
  port: int,
  folder: str | os.PathLike,
  *,
  suffix: str = '.npz',
  timeout: float = 60.0,
) -> tuple[dict[str, pathlib.Path], int]:
  """Connects to a cloud and writes what it sends, `<folder>/<name><suffix>`.

  Nothing is put there before all sets have arrived whole. They are then put there one after the other: each
  file is the old or the new one, whatever happens, but who ends the process at this moment may find both.

  Args:
    host: of the cloud.
    port: of the cloud.
    folder: made if it is not there; one process at a time receives into it.
    suffix: `.npz` or `.array_record`.
    timeout: seconds that the cloud is waited for.

  Returns:
    The files by name, and the bytes on the wire.

  Raises:
    ConnectionError: if the cloud is not there, goes away in the middle, or sends what is not its protocol or
      was damaged on the way. Nothing half-written stays.
    ValueError: for records that are not what their header says, or not finite.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  # Under one name, so that what a killed process left goes.
  arriving, received = folder / 'arriving.partial', _Counted()
  shutil.rmtree(arriving, ignore_errors=True)
  try:
    arriving.mkdir()
    with socket.create_connection((host, port), timeout=timeout) as connection:
      received.connection = connection
      if received.message(MAX_TEXT) != GREETING:
        raise ConnectionError('this is no cloud of features of this version')
      names = []
      while (text := received.message(MAX_TEXT)) != FAREWELL:
        name, header = _announced(text)
        write_feature_file(arriving / f'{name}{suffix}', received.records(header), header)
        names.append(name)
    files = {name: folder / f'{name}{suffix}' for name in names}
    for name, path in files.items():
      (arriving / f'{name}{suffix}').replace(path)
    return files, received.count
  except (OSError, OverflowError) as error:
    hint = (
      ''
      if received.count
      else ' Either no cloud waits there, or it still gathers or serves another device.'
    )
    raise ConnectionError(
      f'features from {host}:{port}: {error}, after {received.count} bytes; nothing of it was kept.{hint}'
    ) from error
  finally:
    shutil.rmtree(arriving, ignore_errors=True)


class _Counted:
  """Messages of a connection, counted."""

  def __init__(self):
    self.connection: Any = None
    self.count = 0

  def exactly(self, size: int) -> bytes:
    """Returns so many bytes; raises ConnectionError if they end before."""
    buffer = bytearray(size)
    view, at = memoryview(buffer), 0
    while at < size:
      got = self.connection.recv_into(view[at:])
      if not got:
        raise ConnectionError(
          f'the connection closed {size - at} bytes before the end of a message'
        )
      at += got
      self.count += got
    return bytes(buffer)

  def message(self, most: int, size: int | None = None) -> bytes:
    """Returns a message of at most `most` bytes, or of exactly `size`."""
    (length,) = struct.unpack('>Q', self.exactly(8))
    if length > most or (size is not None and length != size):
      wanted = f'{size}' if size is not None else f'at most {most}'
      raise ConnectionError(f'a message of {length} bytes came, expected {wanted}')
    return self.exactly(length)

  def records(self, header: FeatureHeader) -> Iterator[Batch]:
    """Yields a set's batches; raises ConnectionError if their checksum is another."""
    check, size = 0, header.record_bytes + 4
    if size > MAX_RECORD:
      raise ConnectionError(f'a record of {size} bytes was announced, more than {MAX_RECORD}')
    most = _message_records(header)
    for start in range(0, header.count, most):
      count = min(most, header.count - start)
      payload = self.message(count * size, count * size)
      check = zlib.crc32(payload, check)
      labels = np.frombuffer(payload, '<i4', count=count)
      features = np.frombuffer(payload, header.wire_dtype, offset=4 * count)
      yield features.reshape(count, *header.shape), labels
    if self.message(4, 4) != struct.pack('>I', check):
      raise ConnectionError('the checksum of the records is another: they were damaged on the way')


def _announced(text: bytes) -> tuple[str, FeatureHeader]:
  try:
    about = json.loads(text)
    name, header = about['name'], about['header']
    _require_name(name)
    return name, FeatureHeader.from_json(header, 'what was received')
  except (ValueError, TypeError, KeyError) as error:
    raise ConnectionError(f'a set of features was announced as it cannot be: {error}') from error


def _require_name(name: str) -> None:
  if not re.fullmatch(r'[A-Za-z0-9_-]{1,100}', name):
    raise ValueError(f'{name!r}: names of sets are of letters, digits, _ and -.')
