"""The baseline: PyTorch eager and diffusers' UNet2DModel, in the fastest of the settings that were tried.

Chosen by the shortest times of a few rounds: channels_last and fused Adam (some percent below the default layout and
the other two Adams). A plain loop over DDIMScheduler takes as long as DDIMPipeline, and ends in uint8 as ours
does. Averages are one _foreach_lerp_, where diffusers' EMAModel loops over the parameters.
"""
import itertools

import diffusers
import numpy as np
import torch

from experiments.throughput import cases
from experiments.throughput.cases import Case, Net
from experiments.throughput.torch_inception import Inception
from experiments.throughput.worker import Prepared, repeat


def unet(net: Net) -> torch.nn.Module:
  """diffusers' U-Net with DDPM's conventions, as its published CIFAR-10 model has them."""
  widths = tuple(net.channels * m for m in net.multipliers)
  attends = [net.size // 2 ** level in net.attention for level in range(len(widths))]
  return diffusers.UNet2DModel(
      sample_size=net.size, in_channels=net.image_channels, out_channels=net.image_channels, block_out_channels=widths,
      down_block_types=tuple('AttnDownBlock2D' if a else 'DownBlock2D' for a in attends),
      up_block_types=tuple('AttnUpBlock2D' if a else 'UpBlock2D' for a in reversed(attends)),
      layers_per_block=net.blocks, norm_num_groups=net.groups, dropout=net.dropout, norm_eps=1e-6, freq_shift=1,
      flip_sin_to_cos=False, downsample_padding=0, attention_head_dim=None)


def _prepared(net, run, **more) -> Prepared:
  setting = f'eager, {torch.get_num_threads()} threads, channels_last'
  versions = {'torch': torch.__version__, 'diffusers': diffusers.__version__}
  return Prepared(run, [p.numel() for p in net.parameters()], 0.0, setting, versions, **more)


def _start(case: Case) -> tuple[Net, torch.nn.Module]:
  torch.set_num_threads(cases.cores())
  torch.manual_seed(0)
  net = cases.NETS[case.net]
  return net, unet(net).to(memory_format=torch.channels_last)


def train(case: Case) -> Prepared:
  """DDPM's loss, its gradient clipped, Adam, one average."""
  about, net = _start(case)
  net.train()
  data = torch.randint(0, 256, (cases.EXAMPLES, about.image_channels, about.size, about.size), dtype=torch.uint8)
  data = data.to(memory_format=torch.channels_last)
  scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000)
  params = list(net.parameters())
  average = [p.detach().clone() for p in params]
  optimizer = torch.optim.Adam(params, cases.LEARNING_RATE, fused=True)
  orders = (torch.from_numpy(np.random.default_rng(epoch).permutation(len(data))) for epoch in itertools.count())
  batches = itertools.chain.from_iterable(order.split(case.batch) for order in orders)
  sums = torch.zeros(2)

  def step():
    x0 = data[next(batches)].float() / 127.5 - 1
    t = torch.randint(0, 1000, (case.batch,))
    eps = torch.randn_like(x0)
    loss = torch.nn.functional.mse_loss(net(scheduler.add_noise(x0, eps, t), t).sample, eps)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(params, cases.CLIP_NORM)
    optimizer.step()
    torch._foreach_lerp_(average, [p.detach() for p in params], 1 - cases.EMA_DECAY)
    sums.add_(torch.stack([loss.detach(), norm]))

  return _prepared(net, repeat(step))


def sample(case: Case) -> Prepared:
  """DDIM from noise to uint8 images, with clipped estimates of x0."""
  about, net = _start(case)
  net.eval()
  scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=True, timestep_spacing='trailing')
  scheduler.set_timesteps(cases.SAMPLING_STEPS)

  @torch.inference_mode()
  def generate():
    x = torch.randn(case.batch, about.image_channels, about.size, about.size)
    x = x.to(memory_format=torch.channels_last)
    for t in scheduler.timesteps:
      x = scheduler.step(net(x, t).sample, t, x).prev_sample
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()

  return _prepared(net, repeat(generate))


def forward(case: Case) -> Prepared:
  """One pass of the network, without gradients."""
  about, net = _start(case)
  net.eval()
  x = torch.randn(case.batch, about.image_channels, about.size, about.size).to(memory_format=torch.channels_last)
  t = torch.full((case.batch,), 500)

  @torch.inference_mode()
  def call():
    return net(x, t).sample

  return _prepared(net, repeat(call))


def inception() -> torch.nn.Module:
  """The Inception network with the weights that our side has."""
  net = Inception().eval().requires_grad_(False)
  shapes = {name: tuple(a.shape) for name, a in net.state_dict().items() if not name.endswith('num_batches_tracked')}
  net.load_state_dict({k: torch.from_numpy(a) for k, a in cases.weights(shapes).items()}, strict=False)
  return net.to(memory_format=torch.channels_last)


def features(case: Case) -> Prepared:
  """All outputs of the Inception network, from images uint8 to numpy arrays."""
  torch.set_num_threads(cases.cores())
  net, images = inception(), cases.images(case)

  @torch.inference_mode()
  def call():
    return {name: values.numpy() for name, values in net(torch.from_numpy(images)).items()}

  outputs = {name: values[:2].ravel().tolist() for name, values in call().items()}
  sizes = [a.numel() for name, a in net.state_dict().items() if not name.endswith('num_batches_tracked')]
  return _prepared(net, repeat(call), outputs=outputs)._replace(sizes=sizes)


WORK = {'train': train, 'sample': sample, 'forward': forward, 'features': features}
