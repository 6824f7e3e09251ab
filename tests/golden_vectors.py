"""The reference vectors that parity tests run over.

`@golden('ssql', 'losses')` runs a test once for every `losses*.npz` in the folder `ssql` of
`$JAXLAB_GOLDEN_DIR` (default: tests/golden). A folder or piece that is missing there is a skip.
"""

import os
import pathlib

import numpy as np
import pytest

OWN_DIR = pathlib.Path(__file__).parent / 'golden'
DIR = pathlib.Path(os.environ.get('JAXLAB_GOLDEN_DIR') or OWN_DIR)


class Vectors(dict):
  """The arrays of one file by name; scalars of `param_*` read as Python numbers through `param`."""

  def __init__(self, path: pathlib.Path):
    with np.load(path, allow_pickle=False) as file:
      super().__init__({name: file[name] for name in file.files})
    self.path = path

  def param(self, name: str):
    """Returns the hyper-parameter `param_<name>` as a Python scalar (or list, if it is an array)."""
    return self[f'param_{name}'].tolist()

  def tree(self, prefix: str) -> dict[str, np.ndarray]:
    """Returns the arrays whose name starts with `prefix`, by the rest of their name."""
    return {name.removeprefix(prefix): a for name, a in self.items() if name.startswith(prefix)}


def golden(slug: str, piece: str):
  """Parametrizes a test's argument `vectors` over the files of `slug` whose name starts with `piece`."""
  paths = sorted((DIR / slug).glob(f'{piece}*.npz'))
  if not paths:
    missing = pytest.param(
      None,
      id=f'golden-{slug}-{piece}',
      marks=pytest.mark.skip(reason=f'no reference vectors {slug}/{piece}*.npz in this folder'),
    )
    return pytest.mark.parametrize('vectors', [missing])
  return pytest.mark.parametrize(
    'vectors',
    [pytest.param(path, id=f'golden-{slug}-{path.stem}') for path in paths],
    indirect=True,
  )


def assert_close(actual, expected, rtol: float = 1e-5, atol: float = 0.0, where=None) -> None:
  """Asserts max |actual - expected| <= rtol * max |expected| + atol, over the elements `where`."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, (actual.shape, expected.shape)
  mask = np.ones(expected.shape, bool) if where is None else np.asarray(where)
  assert np.all(np.isfinite(actual[mask])), 'non-finite values'
  if not mask.any():
    return
  error = np.max(np.abs(actual - expected)[mask])
  bound = rtol * np.max(np.abs(expected)[mask]) + atol
  assert error <= bound, f'max error {error:.3g} > {bound:.3g}'
