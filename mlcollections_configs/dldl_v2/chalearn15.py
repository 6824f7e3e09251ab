"""Apparent ages of ChaLearn 2015 by ThinAgeNet, with the constants of the official code.

Aligned face crops below `data/chalearn15`, and lists `train.txt` and `val.txt` with lines `path age sigma`.
Start from weights of a network that tells faces apart, `--config.weights=FILE`.
"""

from ml_collections import ConfigDict

MEAN, STD = (0.5958, 0.4637, 0.4065), (0.2693, 0.2409, 0.2352)


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = faces('chalearn15', 2476, (0.0, 100.0, 1.0), train=['train'], test=['val'])
  config.data.test_decode.resize = 256
  return config


def faces(
  name: str, train_size: int, grid: tuple, train: list, test: list, sigma: float | None = None
) -> ConfigDict:
  """Returns the settings of a set of faces.

  Args:
    name: of the folder in `data`.
    train_size: training images.
    grid: of the labels.
    train: names of the lists of training images; likewise `test`.
    test: see `train`.
    sigma: deviation of images whose lists say none.
  """
  config = ConfigDict()
  options = dict(root=f'data/{name}', decode=False) | ({} if sigma is None else dict(sigma=sigma))
  paths = lambda names: tuple(f'data/{name}/{item}.txt' for item in names)  # noqa: E731
  config.data = dict(
    name='valued_images', grid=grid, train_size=train_size, stored_image=(224, 224, 3),
    mean=MEAN, std=STD, num_threads=16,
    train_options=dict(paths=paths(train), **options),
    test_options=dict(paths=paths(test), **options),
    train_decode=dict(size=224), test_decode=dict(size=224),
  )  # fmt: skip
  config.model = dict(name='thin_agenet')
  config.augment = dict(flip=0.5, grayscale=0.5, rescale=112, rotation=15.0, jitter=0.4)
  config.mirror = True
  config.recipe = dict(
    epochs=60,
    batch_size=128,
    optimizer=dict(name='adam', betas=(0.9, 0.999), eps=1e-7),
    schedule=dict(name='multistep', base=1e-3, milestones=(30,), factor=0.1),
  )
  # As the official code trains: the distribution first, then both. One phase is the paper's text.
  config.learners = {
    'L1 regression': dict(loss='l1', role='baseline'),
    'ranking': dict(loss='rank', role='baseline'),
    'DEX': dict(loss='dex', role='baseline'),
    'DLDL': dict(loss='dldl', role='baseline'),
    'DLDL-v2': dict(weight=1.0, after='DLDL'),
    'DLDL-v2, one phase': dict(weight=1.0),
  }
  config.pictured = ('DLDL', 'DLDL-v2')
  return config
