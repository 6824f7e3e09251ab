"""SimSiam with ResNet-50 on ImageNet, 100 epochs (constants of the official code).

The predictor's learning rate stays constant. Images are decoded to 256x256 on the host and cropped from there
on the device. Prepare the data once: `tfds build imagenet2012 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import views


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='imagenet2012')
  config.augment = views.photographs()

  config.methods = ('simsiam',)
  config.model = dict(name='resnet50', zero_init_residual=True)
  config.heads = dict(hidden=2048, features=2048, predictor=512)
  config.predictor_rate = 0.1

  config.recipe = dict(
    epochs=100,
    batch_size=512,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
    schedule=dict(name='cosine_per_epoch', base=0.1),  # 0.05 x 512 / 256
  )
  config.log_every = 50
  config.checkpoint_every = 5000

  config.eval_batch_size = 1024
  config.eval = dict(
    k=200,
    temperature=0.1,
    probe=dict(name='lars', options=dict(learning_rate=0.1, epochs=90, batch_size=4096)),
  )
  config.reported = 'ImageNet, ResNet-50: linear probe 68.1 % (100 epochs), 71.3 % (800).'
  return config
