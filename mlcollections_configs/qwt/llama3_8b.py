"""QwT on LLaMA3-8B: GPTQ weights at 4 bits, a compensation behind every decoder layer.

  python -m experiments.qwt --config=mlcollections_configs/qwt/llama3_8b.py --workdir=DIR \\
    --config.network.llama.data.train_split=c4.npy --config.network.llama.data.test_split=wikitext2.npy

The two files hold tokens of the model's own tokenizer (`jaxlab.data.TokenFile`); `train_size` is the number
of windows of 2048 tokens in the first. Calibration: 128 windows, as GPTQ does; the paper does not say what
its compensation takes, nor its exact settings: those here are GPTQ's defaults in groups of 128. The weights
(huggingface.co/meta-llama, after its license has been accepted) stay in bfloat16, float and quantized ones
16 GB each, split over the chips; a batch is one window a chip on 16 of them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = ConfigDict()
  config.seed = 0
  config.networks = ('llama',)
  config.networks_dir = ''
  config.bits = ('4w16a', '3w16a')
  config.calibration = dict(ranges=1, compensation=128, batch_size=16)
  config.qwt = dict(method=dict(), options=dict(dtype='float16', target='local', start_block=0))
  config.network = dict(
    llama=dict(
      task='language',
      pretrained='llama3_8b.meta-llama/Meta-Llama-3-8B',
      model=dict(name='llama3_8b', dtype='bfloat16', param_dtype='bfloat16'),
      data=dict(
        name='tokens',
        train_split='c4.npy',
        test_split='wikitext2.npy',
        train_options=dict(vocab_size=128256, length=2048),
        test_options=dict(vocab_size=128256, length=2048),
        train_size=4096,
        length=2048,
      ),
      batch_size=16,
      eval_batch_size=16,
      quantization='gptq',
      gptq=dict(group_size=128, act_order=False, damping=0.01),
      blocks=r'layers_\d+',
    )
  )
  config.mesh = dict(data=1, fsdp=-1, tensor=1)
  config.claims = ()
  return config
