"""The machine of a run: figures of small networks move with it and its threads."""

import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax


def describe() -> dict[str, Any]:
  """Returns the processor, its cores, those that this process may use, and jax's devices, as plain values."""
  devices = jax.devices()
  return {
    'processor': processor(),
    'cores': os.cpu_count(),
    'threads': threads(),
    'device': devices[0].device_kind,
    'devices': len(devices),
    'processes': jax.process_count(),
  }


def sentence(machine: Mapping[str, Any]) -> str:
  """Returns what `describe` found, for a page; nothing of an unknown machine."""
  if not machine:
    return 'machine not recorded'
  text = f'{machine["processor"]}, {machine["threads"]} of {machine["cores"]} cores'
  if machine['device'] != 'cpu' or machine['devices'] > 1:
    text += f', {machine["devices"]} x {machine["device"]}'
  return text + f', {machine["processes"]} processes' * (machine['processes'] > 1)


def threads() -> int:
  """Returns how many threads XLA's CPU backend computes with: one for each core that may be used."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def processor() -> str:
  """Returns the processor's name."""
  try:
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()
