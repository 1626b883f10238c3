"""The baseline: PyTorch and diffusers' networks with our weights.

Eager on a CPU, in the settings that took the least time in a few rounds: channels_last and fused Adam (some percent
below the default layout and the other two Adams). A plain loop over a scheduler takes as long as a pipeline, and ends
in uint8 as ours does. Averages are one _foreach_lerp_, where diffusers' EMAModel loops over the parameters. On a GPU
the default layout and torch.compile are sides of their own, float32 products may be TF32, and bfloat16 is autocast for
training and the type of the weights for the rest.
"""
import contextlib
import itertools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from diffusion_jax.data import pipeline
from experiments.throughput import cases
from experiments.throughput.torch_inception import Inception
from experiments.throughput.worker import Job, Prepared, best, reading, repeat

CLASSES = {'clip_text_model': transformers.CLIPTextModel}  # by what their configs say


def start(job: Job) -> str:
  """Threads, seed and precision; the device."""
  torch.set_num_threads(cases.cores())
  torch.manual_seed(0)
  torch.set_float32_matmul_precision('high' if job.platform == 'gpu' else 'highest')
  return 'cuda' if job.platform == 'gpu' else 'cpu'


def load(job: Job) -> torch.nn.Module:
  """The network that our side wrote into the job's folder."""
  device, config = start(job), json.loads((job.folder / 'config.json').read_text())
  made = CLASSES.get(config.get('model_type')) or getattr(diffusers, config['_class_name'])
  net = made.from_pretrained(job.folder).to(device)
  if isinstance(net, diffusers.DiTTransformer2DModel):
    share_embedding(net)
  if job.case.dtype != 'float32' and job.case.work != 'train':
    net = net.to(getattr(torch, job.case.dtype))
  return net if job.mode == 'plain' else net.to(memory_format=torch.channels_last)


def share_embedding(net: torch.nn.Module) -> None:
  """Makes the copies of the embedding that every block has one, with DiT's own frequencies, as its weights mean it."""
  for block in net.transformer_blocks:
    block.norm1.emb = net.transformer_blocks[0].norm1.emb
  net.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift = 0


def compiled(job: Job, net: torch.nn.Module, call: Callable[[], Any]) -> float:
  """Compiles `net` in place where the job says so; the seconds that its first call takes longer than its second."""
  if job.mode != 'compile':
    return 0.0
  net.compile()
  times = [time.perf_counter()]
  for _ in range(2):
    call()
    times.append(time.perf_counter())
  return times[1] - times[0] - (times[2] - times[1])


def prepared(job: Job, net: torch.nn.Module, call: Callable[[], Any], **more: Any) -> Prepared:
  """What all work hands to the worker; `call` is one iteration."""
  gpu, sizes = job.platform == 'gpu', [p.numel() for p in net.parameters()]
  wait = torch.cuda.synchronize if gpu else lambda: None

  def run(k):
    repeat(call)(k)
    wait()

  setting = ', '.join(([] if gpu else [f'{torch.get_num_threads()} threads']) + [
      'compiled' if job.mode == 'compile' else 'eager', 'default layout' if job.mode == 'plain' else 'channels_last'])
  versions = {m.__name__: m.__version__ for m in (torch, diffusers, transformers)}
  return Prepared(run, sizes, compiled(job, net, lambda: run(1)), setting, versions,
                  device=torch.cuda.get_device_name() if gpu else '',
                  peak_bytes=torch.cuda.max_memory_allocated if gpu else None, **more)


def put(job: Job, array: np.ndarray, device: str) -> torch.Tensor:
  """An input of `cases.inputs`: channels first, and in the type of the weights if it is no index."""
  x = torch.from_numpy(array)
  if array.ndim == 4:
    x = x.permute(0, 3, 1, 2)
    x = x.contiguous() if job.mode == 'plain' else x.contiguous(memory_format=torch.channels_last)
  return x.to(device, getattr(torch, job.case.dtype) if x.is_floating_point() else torch.int64)


def train(job: Job) -> Prepared:
  """DDPM's loss, its gradient clipped, Adam, one average."""
  net = load(job).train()
  case, about, device = job.case, cases.net_of(job.case), net.device
  data = torch.randint(0, 256, (cases.EXAMPLES, about.channels, about.size, about.size), dtype=torch.uint8).to(device)
  if job.mode != 'plain':
    data = data.to(memory_format=torch.channels_last)
  scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000)
  params = list(net.parameters())
  average = [p.detach().clone() for p in params]
  optimizer = torch.optim.Adam(params, cases.LEARNING_RATE, fused=True)
  orders = (torch.from_numpy(np.random.default_rng(epoch).permutation(len(data))) for epoch in itertools.count())
  batches = itertools.chain.from_iterable(order.split(case.batch) for order in orders)
  sums = torch.zeros(2, device=device)
  low = torch.autocast(device.type, getattr(torch, case.dtype)) if case.dtype != 'float32' else contextlib.nullcontext()

  def step():
    x0 = data[next(batches).to(device)].float() / 127.5 - 1
    t = torch.randint(0, 1000, (len(x0),), device=device)
    eps = torch.randn_like(x0)
    with low:
      predicted = net(scheduler.add_noise(x0, eps, t), t).sample
    loss = torch.nn.functional.mse_loss(predicted.float(), eps)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(params, cases.CLIP_NORM)
    optimizer.step()
    torch._foreach_lerp_(average, [p.detach() for p in params], 1 - cases.EMA_DECAY)
    sums.add_(torch.stack([loss.detach(), norm]))

  return prepared(job, net, step)


def sample(job: Job) -> Prepared:
  """DDIM or ancestral sampling from noise to uint8 images, with clipped estimates of x0."""
  net = load(job).eval()
  case, about = job.case, cases.net_of(job.case)
  kind = diffusers.DDPMScheduler if case.sampler == 'ancestral' else diffusers.DDIMScheduler
  spacing = 'linspace' if case.sampler == 'ancestral' else 'trailing'
  scheduler = kind(num_train_timesteps=1000, clip_sample=True, timestep_spacing=spacing)
  scheduler.set_timesteps(case.steps)
  times = scheduler.timesteps.to(net.device)

  @torch.inference_mode()
  def generate():
    x = torch.randn(case.batch, about.channels, about.size, about.size, dtype=net.dtype).to(net.device)
    if job.mode != 'plain':
      x = x.to(memory_format=torch.channels_last)
    for t in times:
      x = scheduler.step(net(x, t).sample, t, x).prev_sample
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()

  return prepared(job, net, generate)


def forward(job: Job) -> Prepared:
  """One pass of the network, without gradients; or of one half of the autoencoder."""
  net = load(job).eval()
  given = {name: put(job, a, net.device) for name, a in cases.inputs(job.case).items()}
  x, t, more = given.get('x'), given.get('noise'), {}
  if 'text' in given:
    more['encoder_hidden_states'] = given['text']
  if 'label' in given:
    more['class_labels'] = given['label']
  call = torch.inference_mode()({
      'encode': lambda: net.encode(x).latent_dist.mean, 'decode': lambda: net.decode(x).sample,
      'forward': lambda: net(given['ids']).last_hidden_state if 'ids' in given else net(x, t, **more).sample,
  }[job.case.work])
  output = call()
  output = (output.permute(0, 2, 3, 1) if output.ndim == 4 else output).float().cpu().numpy()
  return prepared(job, net, call, outputs={'output': cases.shown(output)})


def inception() -> torch.nn.Module:
  """The Inception network with the weights that our side has."""
  net = Inception().eval().requires_grad_(False)
  shapes = {name: tuple(a.shape) for name, a in net.state_dict().items() if not name.endswith('num_batches_tracked')}
  net.load_state_dict({k: torch.from_numpy(a) for k, a in cases.weights(shapes).items()}, strict=False)
  return net.to(memory_format=torch.channels_last)


def features(job: Job) -> Prepared:
  """All outputs of the Inception network, from images uint8 to numpy arrays."""
  start(job)
  net, images = inception(), cases.images(job.case)

  @torch.inference_mode()
  def call():
    return {name: values.numpy() for name, values in net(torch.from_numpy(images)).items()}

  outputs = {name: values[:2].ravel().tolist() for name, values in call().items()}
  sizes = [a.numel() for name, a in net.state_dict().items() if not name.endswith('num_batches_tracked')]
  return prepared(job, net, call, outputs=outputs)._replace(sizes=sizes)


def draw(job: Job) -> Prepared:
  """StableDiffusionPipeline on the folder that our side wrote: prompts to uint8 images."""
  case, device = job.case, start(job)
  pipe = diffusers.StableDiffusionPipeline.from_pretrained(job.folder / 'theirs', local_files_only=True).to(device)
  pipe.set_progress_bar_config(disable=True)
  networks = [pipe.unet, pipe.vae, pipe.text_encoder]
  if job.mode != 'plain':
    networks = [net.to(memory_format=torch.channels_last) for net in networks]

  def call(latents=None):
    images = pipe([cases.PROMPT] * case.batch, negative_prompt=[cases.NEGATIVE] * case.batch, latents=latents,
                  guidance_scale=cases.GUIDANCE, num_inference_steps=case.steps, output_type='np').images
    return (images * 255).round().astype(np.uint8)

  noise = torch.from_numpy(np.load(job.folder / 'noise.npy')).to(device)
  return prepared(job, torch.nn.ModuleList(networks), call, outputs={'images': cases.shown(call(noise))})


class Pictures(torch.utils.data.Dataset):
  """The files of a folder of classes by path: (uint8 [S, S, 3], label)."""

  def __init__(self, folder: pathlib.Path):
    self.files = sorted(folder.glob('*/*.jpg'))
    self.classes = sorted({file.parent.name for file in self.files})

  def __len__(self):
    return len(self.files)

  def __getitem__(self, i):
    with Image.open(self.files[i]) as image:
      return np.array(image.convert('RGB')), self.classes.index(self.files[i].parent.name)


def read(job: Job) -> Prepared:
  """DataLoader with as many processes as ours has, in the order of ours."""
  start(job)
  data = Pictures(job.folder / 'pictures')
  order = lambda: (pipeline.indices(0, step, cases.READ, len(data)).tolist() for step in itertools.count())
  loader = lambda: iter(torch.utils.data.DataLoader(data, batch_sampler=order(), num_workers=cases.READ_AGAINST))
  images, labels = next(loader())
  found = prepared(job, torch.nn.Module(), lambda: None, outputs={
      'images': cases.shown(images.numpy()), 'labels': labels.double().tolist()})
  return found._replace(run=reading(loader()), setting=f'{cases.READ_AGAINST} processes')


def save(job: Job) -> Prepared:
  """run(k): torch.save of the weights, both moments of Adam and an average, and what it takes to be on the disk."""
  net = load(job)
  params = list(net.parameters())
  state = [[p.detach().clone() for p in params] for _ in range(4)]
  return prepared(job, net, lambda: torch.save(state, job.folder / 'checkpoint.pt'))


def limits(job: Job) -> Prepared:
  """run(k): the most FLOP/s of a matrix product in each type, and bytes/s of a copy, out of k of each."""
  device, (size, length) = start(job), job.sizes()
  a = {dtype: torch.full((size, size), 0.5, dtype=getattr(torch, dtype), device=device) for dtype in job.dtypes()}
  x = torch.zeros(length, device=device)
  y, wait = torch.empty_like(x), torch.cuda.synchronize if device == 'cuda' else lambda: None

  def run(k):
    rates = {dtype: 2 * size ** 3 / best(lambda dtype=dtype: (a[dtype] @ a[dtype], wait()), k) for dtype in a}
    return {'rates': {**rates, 'copy': 8 * length / best(lambda: (y.copy_(x), wait()), k)}}

  return prepared(job, torch.nn.Module(), lambda: None)._replace(run=run)


WORK = {'train': train, 'sample': sample, 'forward': forward, 'encode': forward, 'decode': forward,
        'features': features, 'draw': draw, 'read': read, 'checkpoint': save, 'limits': limits}
