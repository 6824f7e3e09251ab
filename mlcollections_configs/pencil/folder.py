"""PENCIL on photographs of your own, a folder a class, whose labels are noisy as they come.

`FOLDER/train/CLASS/*.jpg` and clean test images in `FOLDER/test`:

  python -m experiments.pencil --config=folder --config.data.train_options.root=FOLDER \\
    --config.data.test_options.root=FOLDER --config.data.num_classes=10 --config.data.train_size=5000

It ends with `labels.csv` in the work directory. ResNet-50 with ImageNet weights; for images named by a list,
see `clothing1m`. A label logit can move by 48 with ten classes: keep `pencil.rate / num_classes` for others.
"""

from ml_collections import ConfigDict

from mlcollections_configs.pencil import clothing1m, embedded
from mlcollections_configs.photographs import photographs

STAGES = (5, 15, 20)


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = clothing1m.get_config()
  config.data = photographs('image_folder', 'FOLDER', 10, 5000)
  start, end, epochs = STAGES
  config.pencil.update(start=start, end=end, alpha=0.1, beta=0.4, rate=1536.0)
  config.recipe.update(epochs=epochs, eval_every=156)
  config.recipe.optimizer.weight_decay = 1e-4
  config.recipe.schedule = embedded.schedule(STAGES, 2e-3, 5e-4)
  config.log_every = 50
  config.claims = ()
  config.reported = ''
  return config
