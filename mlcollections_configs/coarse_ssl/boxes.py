"""Boxes of scenes of two digits by random CNNs, without pretraining; seconds of CPU time.

100 of the embedded setting's scenes, boxes enlarged by 1.2.
"""

from ml_collections import ConfigDict

from mlcollections_configs.coarse_ssl import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data.update(train_size=100)
  config.data.train_options.update(length=100)
  config.recipe.batch_size = 64
  config.eval_batch_size = 48
  config.runs = ('grid', 'random', 'coarse', 'true')
  config.pretrain = False
  config.scenes_eval = None
  coarse, true = dict(method='coarse crops'), dict(baseline='true boxes, enlarged')
  config.claims = (
    dict(
      statement='objects overlapped by more than 0.3: at least 0.3 more than by random boxes',
      metric='recall_0.3', baseline='random boxes', margin=0.3, **coarse,
    ),
    dict(
      statement='coverage of objects at least 0.9 (true boxes: 1)',
      metric='coverage', margin=-0.1, **coarse, **true,
    ),
    dict(
      statement='at most 0.3 objects a crop more than in true boxes',
      metric='objects', margin=-0.3, higher_is_better=False, **coarse, **true,
    ),
  )  # fmt: skip
  return config
