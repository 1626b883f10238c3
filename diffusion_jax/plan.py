"""COMMAND: says before you pay whether a config fits a machine, how fast a step can be, and what the run costs.

Measured, for XLA says it of the programs compiled for that machine: memory, collectives, bytes read and written.
Counted in the traced programs: FLOPs. Estimated: times, by a roofline of public peaks, and with them the price.
"""
import contextlib
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax

from diffusion_jax import ahead
from diffusion_jax import model as model_lib
from diffusion_jax import topology as topology_lib
from diffusion_jax.ahead import Program
from diffusion_jax.runtime import command, log, sharding
from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime.config import Config, UserError
from diffusion_jax.topology import Topology

MIB, GIB = 2 ** 20, 2 ** 30
DOES_NOT_FIT = 1  # the exit status


def roofline(program: Program, topology: Topology) -> dict[str, float]:
  """Seconds for a run of a program, each peak by itself; no run is faster than 'at_best', the largest of them.

  'one_after_another' is their sum, as if nothing overlapped. Where XLA does not say what is read and written, it is
  taken to be all that lies in memory, once each: at least.
  """
  chip, share = topology.chip, topology.share
  rate = lambda dtype: chip.peak * 1e12 * share * (1 if dtype == 'bfloat16' else chip.float32)
  spread = topology.platform == 'cuda' and topology.chips > topology_lib.NODE
  links = (chip.network if spread else chip.links) * 1e9 * share
  seconds = {'compute': sum(n / len(topology.devices) / rate(dtype) for dtype, n in program.flops.items()),
             'hbm': moved(program) / (chip.bandwidth * 1e9 * share),
             'links': sum(c.sent for c in program.collectives) / links}
  return seconds | {'at_best': max(seconds.values()), 'one_after_another': sum(seconds.values())}


def moved(program: Program) -> float:
  """The bytes that a device reads and writes: XLA's count, or all that lies in memory once each."""
  return program.bytes_accessed or 2 * dict(program.memory).get('total', 0)


def largest_batch(program: Program, other: Program | None, batch: tuple[int, int], lanes: int, usable: float) -> int:
  """How many images a step can take in `usable` bytes of each device, of the `lanes` that share a batch.

  batch: the sizes that `program` and `other` were compiled for. From two programs: by the line through their
  memory. From one: as if everything that is not the state grew with the batch, so that more may fit.
  """
  total = dict(program.memory)['total']
  if other:
    slope = (dict(other.memory)['total'] - total) / (batch[1] - batch[0])
  else:
    slope = sum(size for name, size in program.memory if name in ('batch', 'activations')) / batch[0]
  return max(0, int((batch[0] + (usable - total) / max(slope, 1)) // lanes * lanes))


def plan(config: Config, topology: Topology, part: str, examples: int = 0, price: float = 0, twice: bool = False,
         quick: bool = False) -> dict[str, Any]:
  """What is known of the 'step' or the 'sampler' (part) of a run on a topology, as plain data: see `lines_of`.

  twice: compile the step for two batches, to know the largest that fits; others: see the flags.
  """
  model, mesh = ahead.model_on(config, topology.devices)

  def compiled(what, traced, rows):
    print(f'compiling {what} for {topology.name}, which takes minutes for a large network', file=sys.stderr, flush=True)
    return ahead.compile_program(traced, rows, mesh.size, quick)

  lanes, batch = sharding.lanes_of(mesh), config.train.batch_size
  result = {'topology': topology.name, 'slices': topology.slices, 'chips': topology.chips, 'devices': mesh.size,
            'chip': topology.chip and topology.chip._asdict(), 'mesh': dict(mesh.shape), 'quick': quick,
            'batch_size': batch, 'batch_per_device': batch / lanes, 'steps': ahead.num_steps(config),
            'images': config.train.images, 'resident': examples, 'versions': log.versions()}
  if part == 'step':
    program = compiled('the train step', *ahead.step_on(model, mesh, topology.platform, examples))
    result['step'] = described(program, topology, config.train.steps_per_call)
    if topology.chip:
      other = None
      if twice:
        with config.unlocked():
          larger = Config({**config, 'train': {**config.train, 'batch_size': 2 * batch}})
        again = model_lib.make(larger, model.image_shape, model.num_classes, model.captions)
        with contextlib.suppress(ahead.DoesNotFit):
          other = compiled('the step of twice the batch', *ahead.step_on(again, mesh, topology.platform, examples))
      usable = topology.chip.hbm * topology.chip.usable * topology.share * GIB
      result['largest_batch'] = largest_batch(program, other, (batch, 2 * batch), lanes, usable)
      result['largest_batch_by'] = 'two compiled programs' if other else 'one compiled program'
      result['run'] = run(result, price)
  else:
    traced, rows, generator = ahead.sampler_on(model, mesh, topology.platform)
    result['sampler'] = described(compiled('the sampler', traced, rows), topology) | {
        'batch_size': generator.batch_size, 'steps': config.sample.steps, 'nfe': generator.nfe}
  return result


def described(program: Program, topology: Topology, runs: int = 1) -> dict[str, Any]:
  """A program as plain data, for one of its `runs` steps."""
  total, chip = dict(program.memory).get('total', 0), topology.chip
  data = {'memory': dict(program.memory), 'flops': {k: n / runs for k, n in program.flops.items()},
          'flops_of_a_device_by_xla': program.flops_by_xla, 'bytes_moved': moved(program) / runs,
          'bytes_moved_by_xla': program.bytes_accessed > 0,
          'collectives': [c._asdict() for c in program.collectives], 'steps_per_call': runs,
          'compile_seconds': program.compile_seconds}
  if chip:
    available = chip.hbm * topology.share * GIB
    data |= {'share_of_hbm': total / available, 'fits': total <= available * chip.usable,
             'seconds': {k: s / runs for k, s in roofline(program, topology).items()}}
  return data


def run(result: dict[str, Any], price: float) -> dict[str, Any]:
  """Hours and price of the whole run, at best and with nothing overlapped."""
  hours = [result['step']['seconds'][key] * result['steps'] / 3600 for key in ('at_best', 'one_after_another')]
  cost = [h * result['chips'] * price for h in hours]
  return {'hours': hours, 'price_per_chip_hour': price, 'price': cost} if price else {'hours': hours}


def heading(result: dict[str, Any]) -> str:
  """What is planned, and where."""
  mesh = ', '.join(f'{name}={size}' for name, size in result['mesh'].items() if size > 1) or 'one device'
  devices = f'{result["chips"]} chips' + f', {result["devices"]} devices' * (result['devices'] != result['chips'])
  return f'{result["config"]} on {result["topology"]}: {devices}, a mesh of {mesh}'


def lines_of(result: dict[str, Any], part: str) -> list[str]:
  """A part of a plan as text: what is measured, what is counted, what is estimated."""
  lines = _program(part, result[part], result)
  if part == 'step':
    lines += ['', *(_estimates(result, result['chip']) if result['chip'] else [
        'Virtual devices have no speed and no memory of their own: nothing is estimated, and memory and collectives '
        'are those of a program for CPUs.'])]
  return lines


def _program(name, data, result):
  what = f'sampler: {data["batch_size"]} images, {data["steps"]} levels, {data["nfe"]} evaluations each' if (
      name == 'sampler') else f'train step: {result["batch_size"]} images, {result["batch_per_device"]:g} on a device'
  how = 'with less optimisation than a run has' if result['quick'] else 'compiled for these chips'
  lines = [f'{what} (measured: {how} in {data["compile_seconds"]:.0f} s)']
  total = data['memory'].get('total')
  for part, size in data['memory'].items():
    note = ''
    if part == 'total' and result['chip']:
      note = (f'{data["share_of_hbm"]:7.1%} of {result["chip"]["hbm"] * result["chips"] / result["devices"]:g} GiB: '
              f'{"fits" if data["fits"] else "DOES NOT FIT"}')
    lines.append(f'  {part:<28}{size / MIB:12,.2f} MiB {note}'.rstrip())
  if not total:
    lines.append('  memory: unknown here')
  lines.append(f'  {"read and written":<28}{data["bytes_moved"] / MIB:12,.2f} MiB'
               + ('' if data['bytes_moved_by_xla'] else ' at least: XLA does not say'))
  lines.append(f'  {"collectives, of one device":<28}{"MiB":>12}{"MiB sent":>12}{"count":>8}')
  for c in data['collectives']:
    kind = f'{c["kind"]} {c["dtype"]}'
    lines.append(f'    {kind:<26}{c["bytes"] / MIB:12,.2f}{c["sent"] / MIB:12,.2f}{c["count"]:8,}')
  if not data['collectives']:
    lines.append('    none')
  flops = sum(data['flops'].values())
  images = result['batch_size'] if name == 'step' else data['batch_size']
  lines.append(f'  {"FLOPs (counted)":<28}{flops:12.3e} on all devices, {flops / images:.3e} for an image, by type '
               + ', '.join(f'{kind} {n / flops:.1%}' for kind, n in data['flops'].items()))
  if name == 'sampler' and 'seconds' in data:
    low, high = (data['batch_size'] / data['seconds'][key] for key in ('one_after_another', 'at_best'))
    lines.append(f'  {"images/s (estimated)":<28}{low:12,.0f} to {high:,.0f}')
  return lines


def _estimates(result, chip):
  seconds, hours = result['step']['seconds'], result['run']['hours']
  rate = lambda s: f'{result["batch_size"] / s:,.0f}'
  lines = [f'Estimated: the peaks of a chip are {chip["peak"]:g} TFLOP/s in bfloat16, {chip["bandwidth"]:,g} GB/s of '
           f'HBM, {chip["links"]:g} GB/s of links ({chip["source"]}).',
           f'  {"products":<28}{seconds["compute"] * 1e3:12,.3f} ms', f'  {"HBM":<28}{seconds["hbm"] * 1e3:12,.3f} ms',
           f'  {"links":<28}{seconds["links"] * 1e3:12,.3f} ms',
           f'  {"a step":<28}{seconds["at_best"] * 1e3:12,.3f} ms at best, {seconds["one_after_another"] * 1e3:,.3f} '
           f'ms if nothing overlaps; no program reaches its peaks',
           f'  {"images/s":<28}{rate(seconds["at_best"]):>12} at best, {rate(seconds["one_after_another"])}',
           f'  {"the run":<28}{hours[0]:12,.2f} h at best, {hours[1]:,.2f} h: {result["images"]:,} images in '
           f'{result["steps"]:,} steps']
  if 'price' in result['run']:
    low, high = result['run']['price']
    lines.append(f'  {"its price":<28}{low:12,.2f} at best, {high:,.2f}: {result["chips"]} chips at '
                 f'{result["run"]["price_per_chip_hour"]:g} an hour each')
  by = ('by the line through two compiled programs' if result['largest_batch_by'].startswith('two') else
        'or more: as if all but the state grew with the batch; --twice compiles another to know')
  lines.append(f'  {"the largest batch":<28}{result["largest_batch"]:12,} images, {by}')
  if result['slices'] > 1:
    lines.append(f'  The network between the {result["slices"]} slices is not in these times.')
  return lines


def mesh_of(text: str) -> dict[str, str]:
  """'data=16,fsdp=16' as overrides of a config; axes that are not named are 1, and data takes the rest."""
  if not text:
    return {}
  sizes = {'data': '-1'} | {name: '1' for name in model_lib.default_config().mesh if name != 'data'}
  for part in text.split(','):
    name, _, size = part.strip().partition('=')
    if name not in sizes or not re.fullmatch(r'-?\d{1,7}', size, re.ASCII):
      raise UserError(f'--mesh must be like data=16,fsdp=16 with axes {", ".join(sizes)}, got {text!r}')
    sizes[name] = size
  return {f'mesh.{name}': size for name, size in sizes.items()}


def main(argv: Sequence[str] | None = None) -> int:
  """`diffusion-jax plan`: see --help. Status 0: it fits; 1: it does not."""
  p = command.parser('plan', 'Compiles the train step and the sampler for machines that need not be there: do they '
                             'fit, how fast can they be, what does the run cost?')
  p.add_argument('--config', required=True, metavar='FILE[:RUN]', help='a config file; --config.a.b=value overrides')
  p.add_argument('--topology', required=True, metavar='CHIP:SHAPE', help=f'such as {topology_lib.EXAMPLES}; chips: '
                                                                        f'{", ".join(topology_lib.CHIPS)}, cpu')
  p.add_argument('--slices', type=int, default=1, help='how many of these, joined by a network (TPUs)')
  p.add_argument('--mesh', default='', help="such as data=16,fsdp=16 (default: the config's)")
  p.add_argument('--examples', type=int, default=0, help='images in the data set: a small one stays on every device')
  p.add_argument('--price', type=float, default=0, help='of a chip for an hour, in any currency')
  p.add_argument('--only', choices=('step', 'sampler'), default='', help='compile one of the two')
  p.add_argument('--twice', action='store_true', help='compile the step for two batches, to know the largest that fits')
  p.add_argument('--quick', action='store_true', help='compile with less optimisation: sooner, for memory alone')
  p.add_argument('--json', metavar='FILE', help='where all of it is written')
  flags, overrides = p.parse(argv)
  if flags.price < 0 or flags.examples < 0:
    raise UserError(f'--price and --examples must be at least 0, got {flags.price:g} and {flags.examples}')
  config = config_lib.load(flags.config)
  config_lib.override(config, mesh_of(flags.mesh) | overrides)
  model_lib.check(config)
  jax.config.update('jax_platforms', 'cpu')  # a TPU or GPU of this machine, perhaps at work, is left alone
  topology = topology_lib.describe(flags.topology, flags.slices)
  if topology.platform != 'cpu':  # programs for devices that are not here cannot be read back from JAX's cache
    jax.config.update('jax_enable_compilation_cache', False)
  result = {'config': flags.config, 'overrides': overrides}
  for part in [flags.only] if flags.only else ['step', 'sampler']:
    first = 'chips' not in result
    result |= plan(config, topology, part, flags.examples, flags.price, flags.twice, flags.quick)
    print('\n'.join([heading(result)] * first + ['', *lines_of(result, part)]), flush=True)
    if flags.json:
      log.write_json(pathlib.Path(flags.json), result)
  return 0 if all(result.get(name, {}).get('fits', True) for name in ('step', 'sampler')) else DOES_NOT_FIT


if __name__ == '__main__':
  sys.exit(command.run(main))
