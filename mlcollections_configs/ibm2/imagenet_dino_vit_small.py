"""IbM2 on ImageNet, 1000-way with 1 to 16 images per class, features of DINO's ViT-S/16.

  python -m experiments.ibm2 --config=imagenet_dino_vit_small \
    --config.backbone.weights=model.safetensors --workdir=DIR

Three draws of each number of shots, the whole validation set. Weights: huggingface.co/timm/
vit_small_patch16_224.dino. Prepare the data once: `tfds build imagenet2012 --file_format=array_record`.
Only the drawn training images and the validation set go through the network; the features stay in
DIR/features.npz. Some of the constants (learning rate of the final training) may have been tuned per setting
by the authors.
"""

from ml_collections import ConfigDict

# Shorter side to 256, central 224, for training and test images alike.
_DECODE = dict(size=224, resize=256, interpolation='bicubic')
VIEW = dict(stored_image=(224, 224, 3), train_decode=_DECODE, test_decode=dict(_DECODE))


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.data = dict(name='imagenet2012', **VIEW)
  config.representations = ('network',)
  config.backbone = dict(
    model=dict(name='vit_small_patch16_224'),
    feature='output',  # the class token behind the last norm
    published='huggingface.co/timm/vit_small_patch16_224.dino',
  )
  config.shots = (1, 2, 3, 4, 5, 8, 16)
  config.draws = 3

  config.num_copies = 200
  config.chunk_size = 128
  config.eval = dict(num_copies=5, chunk_size=512)
  return config
