"""SSQL with ResNet-50 on ImageNet, the paper's setting (constants of the official code).

  python -m experiments.ssql --config=mlcollections_configs/ssql/imagenet_resnet50.py --workdir=gs://...

100 epochs at batch 256 with statistics over the whole batch (SyncBN), the linear probe with LARS for 60.
Prepare the data once: `tfds build imagenet2012 --file_format=array_record`. Images are decoded to 256x256
(shorter side, center) on the host and cropped from there on the device; the official code crops from the
full photograph. For 200 epochs: `--config.epochs=200`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ssql import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  config.data = dict(
    name='imagenet2012',
    train_split='train',
    test_split='validation',
    train_options=dict(decode=False),
    test_options=dict(decode=False),
    train_decode=dict(size=256, draft=True),
    test_decode=dict(size=224, resize=256),
    train_size=1281167,
    stored_image=(256, 256, 3),
    image_size=224,
    channels=3,
    num_threads=16,
    num_workers=16,
  )
  config.augment = dict(
    scale=(0.2, 1.0),
    jitter=(0.4, 0.4, 0.4, 0.1),
    jitter_probability=0.8,
    grayscale_probability=0.2,
    blur_probability=0.5,
    blur_kernel=23,
    flip_probability=0.5,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
  )
  config.model = dict(
    backbone=dict(name='resnet50', zero_init_residual=True),
    projector=dict(hidden=2048, features=2048),
    predictor_hidden=512,
  )
  config.momentum = 0.99

  config.batch_size = 256
  config.epochs = 100
  config.optimizer = dict(name='sgd', momentum=0.9, weight_decay=1e-4)
  config.schedule = dict(name='cosine_per_epoch', base=0.05)
  config.checkpoint_every = 5000

  config.eval.update(
    calibration=256,
    batch_size=1024,
    k=200,
    probe=dict(name='lars', learning_rate=0.1, epochs=60, batch_size=4096),
  )
  return config
