"""IbM2 on ImageNet, 1000-way with 1 to 16 images per class, features of DINO's ViT-S/16.

  python -m experiments.ibm2 --config=mlcollections_configs/ibm2/imagenet_dino_vit_small.py \
    --config.model.weights=model.safetensors --workdir=DIR

Three draws of each number of shots, the whole validation set. Weights: huggingface.co/timm/
vit_small_patch16_224.dino. Prepare the data once: `tfds build imagenet2012 --file_format=array_record`.
Only the drawn training images and the validation set go through the network; the features stay in
DIR/features.npz. Some of the constants (learning rate of the final training) may have been tuned per setting
by the authors.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ibm2 import embedded

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  config.representations = ('network',)
  config.shots = (1, 2, 3, 4, 5, 8, 16)
  config.draws = 3
  config.data = images('imagenet2012', 'train', 'validation', 1281167, 1000)
  config.model = dict(
    name='vit_small_patch16_224',
    feature='output',  # the class token behind the last norm
    weights='',
    prefix='',
    ignore=(),
  )
  config.eval_batch_size = 512
  config.num_copies = 200
  config.chunk_size = 128
  config.eval = dict(num_copies=5, chunk_size=512, step=0.5)
  config.claims = ()
  return config


def images(name: str, train: str, test: str, train_size: int, num_classes: int) -> dict:
  """Returns the data: shorter side to 256 (bicubic), central 224, for training and test images alike."""
  view = dict(size=224, resize=256, interpolation='bicubic')
  return dict(
    name=name,
    train_split=train,
    test_split=test,
    train_options=dict(decode=False),
    test_options=dict(decode=False),
    train_decode=view,
    test_decode=dict(view),
    train_size=train_size,
    num_classes=num_classes,
    stored_image=(224, 224, 3),
    num_threads=16,
    num_workers=16,
    **IMAGENET,
  )


def resnet50(config: ConfigDict, prefix: str) -> None:
  """Makes the setting that of ResNet-50: pooled features, batch 512, 60 epochs."""
  config.model = dict(
    name='resnet50', feature='output', weights='', prefix=prefix, ignore=(r'fc\..*',)
  )
  config.batch_size = 512
  config.chunk_size = 64  # of 2048 channels
  config.search.threshold_epochs = 60
  config.train.epochs = 60
