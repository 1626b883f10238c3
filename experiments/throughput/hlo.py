"""What each operation of a compiled program is for, read from the program's text."""
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from diffusion_jax.programs import ARRAY, HEAD, KINDS

# '%name = TYPE opcode(operands), attributes'; a type may be a tuple of types.
INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$')
CALLED = re.compile(r'\b(?:calls|to_apply|body|condition|branch_computations|called_computations)='
                    r'(\{[^{}]*\}|%?[\w.-]+)')
OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
TARGET = re.compile(r'custom_call_target="([^"]*)"')
WRAPPED = re.compile(r'(\w+)\((.*)\)')
# Segments of a path that are jax's, not the net's.
PLUMBING = re.compile(r'while|body|cond|branch_\d+_fun|closed_call|core_call|checkpoint|rematted_computation|remat\d?|'
                      r'pjit|shard_map|custom_[jv][vj]p_call(_jaxpr)?|None|')
RANDOM = re.compile(r'threefry|random_bits|_uniform|_normal|bernoulli|erf_inv|rng|random_')
MOVES = {'copy', 'copy-start', 'copy-done', 'transpose', 'slice', 'dynamic-slice', 'dynamic-update-slice', 'pad',
         'reshape', 'bitcast', 'concatenate', 'broadcast', 'reverse', 'gather', 'scatter', 'parameter', 'constant',
         'tuple', 'get-tuple-element', 'iota', 'convert'}


class Op(NamedTuple):
  """An instruction: its opcode (the target of a custom call), type, what jax calls it, what it calls and is given."""
  opcode: str
  shape: str
  op_name: str
  calls: tuple[str, ...]
  text: str  # from the operands on

  def operands(self) -> list[str]:
    """Their names."""
    return re.findall(r'%([\w.-]+)', self.text.split('),')[0])


class Program(NamedTuple):
  """ops: {name: instruction} of all computations; members: {computation: names}."""
  ops: Mapping[str, Op]
  members: Mapping[str, list[str]]

  def inside(self, name: str) -> list[Op]:
    """The instruction and, of a fusion, all that it fuses."""
    op = self.ops[name]
    return [op] + [found for computation in op.calls if op.opcode == 'fusion'
                   for inner in self.members.get(computation, ()) for found in self.inside(inner)]

  def children(self, name: str) -> list[str]:
    """The instructions that run as part of this one, and are seen running too: of loops, calls and branches."""
    op = self.ops[name]
    return [] if op.opcode == 'fusion' else [inner for c in op.calls for inner in self.members.get(c, ())]


def parse(text: str) -> Program:
  """Of `Compiled.as_text()`."""
  ops, members, computation = {}, {}, ''
  for line in text.splitlines():
    if head := HEAD.match(line):
      computation = head[2]
      members[computation] = []
    elif (found := INSTRUCTION.match(line)) and computation:
      name, shape, opcode, rest = found.groups()
      target = TARGET.search(rest)
      called = [c.strip(' %') for group in CALLED.findall(rest) for c in group.strip('{}').split(',')]
      named = OP_NAME.search(rest)
      ops[name] = Op(target[1] if target else opcode, shape, named[1].split(':')[0] if named else '', tuple(called),
                     rest)  # what was merged has its names in a row
      members[computation].append(name)
  return Program(ops, members)


def path(op_name: str) -> tuple[str, ...]:
  """The modules and scopes that an operation belongs to: 'jit(f)/transpose(jvp(UNet))/a/dot_general' -> (UNet, a).

  What is computed again, or the gradient of what was, has its path twice: the last counts.
  """
  found = []
  for segment in op_name.split('/')[:-1]:
    restart = False
    while wrapped := WRAPPED.fullmatch(segment):
      if wrapped[1] in ('jit', 'pjit'):
        segment = ''
        break
      restart, segment = restart or wrapped[1] == 'jvp', wrapped[2]
    if restart and segment:
      found = []
    if not PLUMBING.fullmatch(segment):
      found.append(segment)
  return tuple(found)


def is_backward(op_name: str) -> bool:
  """Whether it belongs to a gradient."""
  return 'transpose(' in op_name


def label(program: Program, name: str, depth: int = 3) -> str:
  """The op_name of an instruction, or of most of what it fuses; or else of what it is given, a gradient first."""
  if '/' in program.ops[name].op_name:
    return program.ops[name].op_name
  named = [op.op_name for op in program.inside(name) if '/' in op.op_name]
  if not named and depth:
    given = [label(program, o, depth - 1) for o in program.ops[name].operands() if o in program.ops]
    named = sorted((text for text in given if '/' in text), key=is_backward, reverse=True)[:1]
  return max(named, key=named.count, default='')


def kind(program: Program, name: str) -> str:
  """What an instruction is for: 'convolution', 'product', 'attention', 'norm', 'optimizer', 'random', 'elementwise' ...

  A product within a convolution's module counts as convolution, since some are computed that way on a CPU; what else
  happens there, as 'beside convolutions': the sums and copies of minimal filtering, biases, resizing.
  """
  inside = program.inside(name)
  opcodes = {op.opcode for op in inside}
  where = path(label(program, name))
  last = where[-1] if where else ''
  convolves = bool(re.match(r'conv|shortcut|(down|up)_\d+_(down|up)sample|MPConv', last))
  if any(opcode.startswith(KINDS) for opcode in opcodes):
    return 'collective'
  if any('conv' in opcode and opcode != 'convert' for opcode in opcodes):
    return 'convolution'
  if any(opcode == 'dot' or re.search(r'matmul|gemm|Gemm|\$dot', opcode) for opcode in opcodes):
    return 'attention' if last == 'attention' else 'convolution' if convolves else 'product'
  if 'update' in where:
    return 'optimizer'
  if last == 'attention' or any('fmha' in opcode or 'attention' in opcode for opcode in opcodes):
    return 'attention'
  if any(re.match(r'norm|\w*Norm', segment) for segment in where):
    return 'norm'
  if RANDOM.search(label(program, name)) or 'rng-bit-generator' in opcodes:
    return 'random'
  if convolves:
    return 'beside convolutions'
  return 'copy' if opcodes - {'fusion'} <= MOVES else 'elementwise'


def _sizes(shape: str) -> list[int]:
  found = ARRAY.search(shape)
  return [int(n) for n in found[2].split(',') if n] if found else []


def flops(program: Program, name: str) -> float:
  """Of the products and convolutions of an instruction; zeros between a convolution's inputs count."""
  total = 0.0
  for op in program.inside(name):
    operands = [program.ops[o] for o in op.operands() if o in program.ops]
    if op.opcode == 'dot' and operands:
      axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', op.text)
      sizes = _sizes(operands[0].shape)
      total += 2 * math.prod(_sizes(op.shape)) * math.prod(sizes[int(i)] for i in axes[1].split(',')) if axes else 0
    elif op.opcode == 'convolution' and len(operands) > 1:
      kernel = re.search(r'dim_labels=\w+_(\w+)->', op.text)
      sizes = _sizes(operands[1].shape)
      if kernel and sizes:
        total += 2 * math.prod(_sizes(op.shape)) * math.prod(sizes) / sizes[kernel[1].index('o')]
  return total
