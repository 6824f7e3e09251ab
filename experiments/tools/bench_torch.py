"""The PyTorch side of the comparison, as a script that the Python of another environment runs.

  PYTHON -I experiments/tools/bench_torch.py --network=resnet18 --size=64 --batch=32 --steps=5 --started=0

It needs torch and timm, and nothing of this project but the file next to it. PyTorch is used as it comes:
eager, NCHW, float32, as many threads as it chooses (with `--threads` that many).
"""

import os
import sys
import time

sys.path.append(os.path.dirname(os.path.abspath(__file__)))

import bench_side
import timm
import torch
from torch import nn
from torch.nn import functional


class WideResNet(nn.Module):
  """WRN-depth-factor on CIFAR: three stages of pre-activation blocks."""

  def __init__(self, depth, factor, num_classes=10):
    super().__init__()
    self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    blocks, channels = [], 16
    for stage in range(3):
      features = 16 * factor * 2**stage
      for index in range((depth - 4) // 6):
        stride = 2 if stage and not index else 1
        blocks.append(PreActivationBlock(channels, features, stride))
        channels = features
    self.blocks = nn.Sequential(*blocks)
    self.bn1 = nn.BatchNorm2d(channels)
    self.linear = nn.Linear(channels, num_classes)

  def forward(self, x):
    """Returns logits of images."""
    x = functional.relu(self.bn1(self.blocks(self.conv1(x))))
    return self.linear(x.mean((2, 3)))


class PreActivationBlock(nn.Module):
  """BN, ReLU, 3x3 convolution, twice, around a shortcut."""

  def __init__(self, channels, features, stride):
    super().__init__()
    self.bn1 = nn.BatchNorm2d(channels)
    self.conv1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
    self.bn2 = nn.BatchNorm2d(features)
    self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
    self.shortcut = None
    if channels != features:
      self.shortcut = nn.Conv2d(channels, features, 1, stride, bias=False)

  def forward(self, x):
    """Maps feature maps to feature maps."""
    y = functional.relu(self.bn1(x))
    if self.shortcut is not None:
      x = self.shortcut(y)
    return x + self.conv2(functional.relu(self.bn2(self.conv1(y))))


class GPT2(nn.Module):
  """GPT-2 small with PyTorch's fused attention; the embedding is the head's kernel, too."""

  def __init__(self, vocab=50257, length=1024, width=768, depth=12):
    super().__init__()
    self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(length, width)
    nn.init.normal_(self.wte.weight, std=0.02)
    self.blocks = nn.Sequential(*(DecoderBlock(width, 12) for _ in range(depth)))
    self.ln_f = nn.LayerNorm(width)

  def forward(self, tokens):
    """Returns logits `[batch, time, vocab]` of tokens."""
    x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
    return self.ln_f(self.blocks(x)) @ self.wte.weight.T


class DecoderBlock(nn.Module):
  """Causal attention, then an MLP, each behind a norm and around a shortcut."""

  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
    self.mlp = nn.Sequential(
      nn.Linear(width, 4 * width), nn.GELU('tanh'), nn.Linear(4 * width, width)
    )

  def forward(self, x):
    """Maps `[batch, time, width]` to the same shape."""
    qkv = self.c_attn(self.ln_1(x)).unflatten(-1, (3, self.heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    y = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    x = x + self.c_proj(y.transpose(1, 2).flatten(2))
    return x + self.mlp(self.ln_2(x))


def create(network, size):
  """Returns the network that `jaxlab.models.create` calls so, for images of `size` pixels."""
  if network == 'gpt2':
    return GPT2()
  if network.startswith('wrn'):
    return WideResNet(*map(int, network[3:].split('_')))
  if network.startswith('cifar_'):
    model = timm.create_model(network.removeprefix('cifar_'), num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model
  return timm.create_model(network, drop_path_rate=0.0)


def main(arguments=None):
  """Measures the training step, then the forward pass, and prints the figures."""
  options = bench_side.parse(arguments)
  bench_side.use_threads(options.threads)
  if options.threads is not None:
    torch.set_num_threads(options.threads)
  torch.manual_seed(0)
  model = create(options.network, options.size)
  optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
  if options.network == 'gpt2':
    inputs = torch.randint(50257, (options.batch, options.size))
    labels = inputs.roll(-1, 1)
  else:
    inputs = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.arange(options.batch) % 10

  def step():
    optimizer.zero_grad(set_to_none=True)
    logits = model(inputs)
    functional.cross_entropy(logits.flatten(0, -2), labels.flatten()).backward()
    optimizer.step()

  def forward():
    with torch.inference_mode():
      model(inputs)

  model.train()
  step()
  first_step = time.time() - options.started
  figures = {'first_step': {'wall': first_step}, 'step': bench_side.least(step, options.steps)}
  model.eval()
  figures['forward'] = bench_side.least(forward, options.steps)
  bench_side.say(
    {
      'figures': figures,
      'parameters': sum(p.numel() for p in model.parameters()),
      'versions': {'torch': torch.__version__, 'timm': timm.__version__},
      'threads': torch.get_num_threads(),
    }
  )


if __name__ == '__main__':
  main()
