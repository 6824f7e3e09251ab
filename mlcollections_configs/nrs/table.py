"""NRS on a table of your own: `--config.data.train=FILE`, and `--config.data.test=FILE` if there is one.

Files: `.npz` (`features`, `labels`), `.csv` (the label in the last column) or LIBSVM's text. Without a file
it runs on the breast cancer table that comes with scikit-learn.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='table', train='breast_cancer', scaling='standardize')
  config.layers = {'NRS': dict(n_mul=20)}
  config.hidden = (128, 128)
  config.recipe = dict(
    epochs=50,
    batch_size=64,
    optimizer=dict(name='adamw'),
    schedule=dict(name='constant', base=1e-3),
  )
  config.trees = ('decision_tree', 'random_forest', 'gradient_boosting', 'random_subspace')
  return config


def libsvm(
  name: str, dim: int, num_classes: int, train_size: int, *, n_mul: int, hidden: int = 256,
  epochs: int = 50, batch_size: int = 128, suffix: str = '.scale',
) -> ConfigDict:  # fmt: skip
  """Returns the settings of a table of LIBSVM's collection, below `data/libsvm`, by the official code.

  Adam at 1e-4 without weight decay (that of the official files is not passed on); features as they are.
  """
  config = get_config()
  file = f'data/libsvm/{name}{suffix}'
  config.data = dict(
    name='table', train=file, test=f'{file}.t', shape=(dim,), num_classes=num_classes,
    train_size=train_size,
  )  # fmt: skip
  config.layers = {'NRS': dict(patch=3, n_mul=n_mul, n_per=1)}
  config.hidden = (hidden, hidden)
  config.recipe.epochs = epochs
  config.recipe.batch_size = batch_size
  config.recipe.schedule.base = 1e-4
  config.recipe.eval_every = train_size // batch_size
  return config
