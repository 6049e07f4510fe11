"""What a set of pairs on disk is made of: `set.json`, and which noise and which prompt pair i has."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fastdistill import __version__
from fastdistill.diffusion import Schedule

from ..config import require
from ..data import shuffled
from ..draws import Draws
from ..files import write_text
from ..solvers import check_solver

FORMAT = 1
FILE = "set.json"


class PairSetError(ValueError):
    """A folder that holds no set, another one than was asked for, or one that is not whole; one line that names it."""


@dataclass(frozen=True)
class PairSet:
    """All that the numbers of a set depend on.

    Attributes:
        count: pairs.
        shard_size: pairs of a file; the last one has what is left.
        seed: of noises and prompts.
        draws: "each": pair i is a function of (seed, i) alone. "whole": of one stream over the set, as `make_pairs`
            draws them.
        noise: "stored", or "seed": drawn again when it is read.
        text: whether the conditions are stored too.
        solver, steps, guidance_scale: of the ODE.
        sample_shape: of one latent.
        dtype: that the network computed in.
        prediction_type, timesteps, zero_terminal_snr, schedule_sha256: of the network and its schedule.
        teacher, unet_sha256, text_sha256: its name, and digests of the weights of its UNet and text encoders.
        prompt_count, prompts_sha256: how many lines of prompts, and which.
        fastdistill: version of the package.
        format: of the files.
    """

    count: int
    shard_size: int
    seed: int
    draws: str
    noise: str
    text: bool
    solver: str
    steps: int
    guidance_scale: float
    sample_shape: tuple[int, ...]
    dtype: str
    prediction_type: str
    timesteps: int
    zero_terminal_snr: bool
    schedule_sha256: str
    teacher: str
    unet_sha256: str
    text_sha256: str
    prompt_count: int
    prompts_sha256: str
    fastdistill: str = __version__
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name in ("count", "shard_size", "steps", "prompt_count"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        require("seed", self.seed, self.seed >= 0, "0 or more")
        require("steps", self.steps, self.steps <= self.timesteps, f"at most the schedule's {self.timesteps}")
        require("draws", self.draws, self.draws in ("each", "whole"), "each or whole")
        require("noise", self.noise, self.noise in ("stored", "seed"), "stored or seed")
        check_solver(self.solver)

    @property
    def shards(self) -> int:
        """How many files."""
        return -(-self.count // self.shard_size)

    def span(self, shard: int) -> range:
        """The pairs of a file."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def noise_of(self, pairs: Sequence[int]) -> Tensor:
        """(n, ...) float32 standard normal, of these pairs."""
        if self.draws == "whole":
            return self._whole[0][list(pairs)]
        shape = self.sample_shape
        return torch.cat([Draws("pair", self.seed, pair, batch_size=1).randn(*shape) for pair in pairs])

    def prompts_of(self, pairs: range) -> Tensor:
        """(n,) int64 which lines of the prompts: each comes equally often."""
        if self.draws == "whole":
            return self._whole[1][pairs.start : pairs.stop]
        return shuffled(pairs.start, len(pairs), self.prompt_count, self.seed)

    @property
    def _whole(self) -> tuple[Tensor, Tensor]:
        return _whole_draws(self.seed, self.count, self.sample_shape, self.prompt_count)

    def differences(self, other: PairSet) -> list[str]:
        """What keeps two processes from working on one set, as `name: mine, the other's`. Names and versions do not."""
        free = ("teacher", "fastdistill")
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{name}: {mine[name]}, {theirs[name]}" for name in mine if name not in free and mine[name] != theirs[name]
        ]

    def dumps(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


@lru_cache(maxsize=1)
def _whole_draws(seed: int, count: int, sample_shape: tuple[int, ...], prompts: int) -> tuple[Tensor, Tensor]:
    """(noise, prompts) of a set in one stream."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *sample_shape, generator=generator)
    return noise, torch.randint(prompts, (count,), generator=generator)


def schedule_facts(schedule: Schedule) -> dict:
    """The fields of a `PairSet` that say what the schedule was."""
    digest = hashlib.sha256()
    for field in fields(schedule):
        digest.update(getattr(schedule, field.name).double().cpu().numpy().tobytes())
    return {
        "timesteps": len(schedule),
        "zero_terminal_snr": bool(schedule.alpha[-1] == 0),
        "schedule_sha256": digest.hexdigest(),
    }


def prompts_facts(prompts: Sequence[str]) -> dict:
    """The fields of a `PairSet` that say which prompts there were."""
    return {"prompt_count": len(prompts), "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest()}


def read_set(folder: Path) -> PairSet:
    """The description of the set in a folder.

    Raises:
        PairSetError: there is none, or it cannot be read.
    """
    file = folder / FILE
    try:
        return _ADAPTER.validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PairSetError(f"{folder}: no set of pairs ({FILE}: {error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise PairSetError(f"{file}: {f'{place}: ' if place else ''}{first['msg']}") from error


_ADAPTER = TypeAdapter(PairSet)


def agree(folder: Path, pair_set: PairSet) -> None:
    """Make `folder` the place of this set, or see that it is already.

    Raises:
        PairSetError: it holds another set: the differences are listed.
        FileExistsError: it holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # of several processes that start at once, one writes
        if (folder / FILE).exists():
            differences = pair_set.differences(read_set(folder))
            if differences:
                raise PairSetError(
                    f"{folder}: holds another set than this one (wanted, there): {'; '.join(differences)}"
                )
            return
        if any(not name.startswith(".") for name in os.listdir(folder)):
            raise FileExistsError(f"{folder}: exists and holds no set of pairs; it is left as it is")
        write_text(folder / FILE, pair_set.dumps())
    finally:
        os.close(descriptor)
