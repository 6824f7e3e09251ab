"""US3L and the rules that it leaves out one at a time, on 2000 images of Fashion-MNIST, 40 epochs.

At most 64 channels, three residual blocks behind a stem. Needs the data set on disk (Debian's package
`dataset-fashion-mnist`) or prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.us3l import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data = dict(
    name='fashion_mnist',
    train_size=2000,
    train_options=dict(limit=2000),
    test_options=dict(limit=1000),
  )
  config.augment = dict(
    kind='resized_crop', scale=(0.3, 1.0), rotation=0.2, jitter=(0.4, 0.0, 0.0, 0.0),
    flip_probability=0.0,
  )  # fmt: skip
  config.runs = ('us3l', 'naive', 'online', 'shared_head', 'sandwich')
  config.model.update(width=32, widths=(32, 64, 64), strides=(2, 2, 1))
  config.recipe.epochs = 40
  config.timed = 3
  config.claims = (
    claim('a quarter of the channels: probe at least 5 points above the network as drawn',
          'untrained', 'probe_0.25', 5.0),
    claim('a quarter of the channels: probe not below own targets', 'own targets', 'probe_0.25'),
    claim('a quarter of the channels loses less than with own targets', 'own targets',
          'probe_drop', higher_is_better=False),
  )  # fmt: skip
  return config


def claim(
  statement: str, baseline: str, metric: str, margin: float = 0.0, higher_is_better: bool = True
) -> dict:
  """Returns the claim that US3L is better by `margin`."""
  return dict(
    statement=statement, metric=metric, baseline=baseline, method='US3L', margin=margin,
    higher_is_better=higher_is_better,
  )  # fmt: skip
