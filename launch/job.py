"""What a launcher starts: a config and a run folder. Launchers import nothing of diffusion_jax, they start commands."""
import dataclasses
import sys

# Exit statuses after which the same command may be started again: it continues where it was.
RETRYABLE = {70, 75, 134, 137, 143}


@dataclasses.dataclass(frozen=True)
class Job:
  """One training run."""
  config: str                                               # FILE[:RUN]
  workdir: str
  overrides: dict[str, str] = dataclasses.field(default_factory=dict)  # {'train.images': '6400'}
  python: str = sys.executable

  def argv(self) -> list[str]:
    """The command line that trains it, or continues."""
    return [self.python, '-m', 'diffusion_jax.train', f'--config={self.config}', f'--workdir={self.workdir}',
            *(f'--config.{key}={value}' for key, value in self.overrides.items())]


def retryable(status: int) -> bool:
  """Whether to start again after `status`; a process killed by signal n has the status -n here, 128 + n in a shell."""
  return (128 - status if status < 0 else status) in RETRYABLE
