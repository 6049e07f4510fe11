"""What test_sharding.py runs in several processes: a tiny DMD2 with guidance, a GAN and an average, and its parts."""

import copy
import functools
import math
import os
import socket
from pathlib import Path

import torch
import torch.distributed.checkpoint  # with all that the first run would import in every process
from diffusers import UNet2DConditionModel
from fastdistill.training import DMD, CheckpointError, Condition, DMDConfig, LatentData, PromptData, Trainer
from fastdistill.training.__main__ import app
from fastdistill.training.config import role_configs
from fastdistill.training.dmd2 import DMD2, DMD2Config
from fastdistill.training.fake_score import FakeScore, mid_block_head
from fastdistill.training.memory import TensorMemory
from fastdistill.training.settings import changed
from fastdistill.training.world import World, world_of_environment
from torch import nn
from torch.distributed.fsdp import fully_shard

from fastdistill import diffusion
from fastdistill.optim import FusedAdamW
from fastdistill.optim.shards import is_sharded, local

from .processes import CONTEXT
from .toys import CONDITIONS, gaussian_teacher

CONFIG = changed(
    DMD2Config(critic_ratio=2, guidance_scale=1.5, gan_weight=0.1, critic_gan_weight=0.1),
    trainer={"updates": 4, "batch_size": 4, "report_every": 1},
    student={"warm_up": 0, "learning_rate": 1e-3, "beta1": 0.9},
    fake_score={"warm_up": 0, "learning_rate": 1e-3, "beta1": 0.9},
)


def unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            block_out_channels=(16,),
            layers_per_block=1,
            cross_attention_dim=8,
            attention_head_dim=2,
            norm_num_groups=4,
        ).to(memory_format=torch.channels_last)


def trainer(world, *, folder=None, validate=None, **settings):
    config = changed(CONFIG, trainer=settings)
    teacher = unet()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        conditions = Condition(torch.randn(3, 5, 8))
        head, samples = mid_block_head(teacher), torch.randn(16, 4, 8, 8)
    method = DMD2(
        teacher,
        diffusion.scaled_linear(zero_terminal_snr=True),
        "v_prediction",
        config,
        conditions[:1],
        fake_score=FakeScore(unet(), head),
    )
    data = LatentData(samples, conditions, torch.arange(16)[:, None] % 3)
    return Trainer(method, data, config.trainer, role_configs(config), folder=folder, validate=validate, world=world)


def whole(t):
    return t.full_tensor().clone() if is_sharded(t) else t.detach().clone()


def tensors(made):
    """Everything that a run's next update depends on, whole, by name."""
    networks = {"student": made.method.student, "fake_score": made.method.fake_score, "average": made.average.network}
    found = {f"{role}.{name}": t for role, network in networks.items() for name, t in network.state_dict().items()}
    for role, updater in made.updaters.items():
        for index, state in updater.optimizer.state_dict()["state"].items():
            found |= {f"{role}.{index}.{key}": value for key, value in state.items()}
        if updater.optimizer.grad_norm is not None:
            found[f"{role}.norm"] = updater.optimizer.grad_norm
        found[f"{role}.guard"] = updater.guard.mean
    return {name: whole(t) for name, t in found.items()}


def train(world, *, stop=None, **options):
    """A run up to `stop` updates, which goes on from what is in `folder`."""
    made = trainer(world, **options)
    made._check_contract = lambda: None  # costs more than the updates; `watch` has it
    if options.get("folder") is not None:
        made.resume()
    run = made.run(lambda progress: progress.update == stop)
    found = {f"delivered.{name}": t.clone() for name, t in run.student.state_dict().items()}
    networks = made.method.roles | {"average": made.average.network}
    moments = [state["exp_avg"] for state in made.updaters["student"].optimizer.state.values()]
    values = {role: list(network.parameters()) for role, network in networks.items()} | {"exp_avg": moments}
    held = {f"held.{role}": torch.tensor(sum(local(t).numel() for t in each)) for role, each in values.items()}
    return tensors(made) | found | held


def run_all(out, jobs):
    with world_of_environment("cpu") as world:
        for name, job in jobs.items():
            torch.save(job(world), Path(out) / f"{name}-{world.rank}.pt")


def run_command(folder, arguments):
    os.chdir(folder)
    app(arguments, standalone_mode=False)


def _as_torchrun(rank, size, port, function, *arguments):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(*arguments)


def processes(function, *arguments, size=2):
    """Call a function in so many processes, started and told of each other as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        CONTEXT.Process(target=_as_torchrun, args=(rank, size, port, function, *arguments)) for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * size


def in_processes(out, jobs, size=2):
    """Each job's results by its name, one per process. A job is a picklable function of a `World`."""
    processes(run_all, str(out), jobs, size=size)
    return {name: [torch.load(Path(out) / f"{name}-{rank}.pt") for rank in range(size)] for name in jobs}


def job(function, **options):
    return functools.partial(function, **options)


ALONE = World()


def read(world, **options):
    made = trainer(world, **options)
    made.resume()
    return tensors(made)


def once(world, **settings):
    """The dtypes that an update of the fake score computes with and keeps, and what it moves it by."""
    made = trainer(world, batch_size=2, sharding="full", **settings)
    dtypes = []
    network = made.method.fake_score.network
    hook = network.mid_block.resnets[0].conv1.register_forward_hook(
        lambda module, given, result: dtypes.extend([module.weight.dtype, result.dtype])
    )
    made.iterate()
    hook.remove()
    optimizer = made.updaters["fake_score"].optimizer
    kept = {p.dtype for p in network.parameters()}
    kept |= {t.dtype for state in optimizer.state.values() for t in state.values()}
    moments = [whole(state["exp_avg"]).flatten() for state in optimizer.state.values()]
    return {"computed in": dtypes[:2], "kept in": list(kept), "exp_avg": torch.cat(moments)}


class Watching:
    """A callback that calls the average and the teacher in the first process alone."""

    def __init__(self, made, world):
        self.made, self.world, self.seen = made, world, []

    def begin(self, progress):
        self(progress, self.made.method.teacher)

    def __call__(self, progress, *others):
        if self.world.is_first:
            x, t, condition = torch.ones(1, 4, 8, 8), torch.tensor([999]), torch.ones(1, 5, 8)
            for network in (progress.student, *others):
                with torch.no_grad():
                    self.seen.append(network(x, t, condition).sample)


def watch(world, **options):
    """What the first process saw of the networks while the other waited, and what all deliver."""
    figures = iter([1.0, 3.0])

    def validate(student):
        with torch.no_grad():
            student(torch.ones(1, 4, 8, 8), torch.tensor([999]), torch.ones(1, 5, 8))
        return {"distance": next(figures)}

    made = trainer(world, validate=validate, validate_every=1, deliver="best", updates=2, **options)
    watching = Watching(made, world)
    run = made.run(watching)
    found = {f"delivered.{name}": t for name, t in run.student.state_dict().items()}
    found |= {f"seen.{number}": t for number, t in enumerate(watching.seen)}
    return found | {"best": torch.tensor(run.best)}


def exchange(world):
    """The mean over the processes of gradients of many sizes and layouts, and the memory that it took beside them."""
    shapes = [(2**18,)] * 16 + [(2**20,), (3, 5), (7,)]
    tensors = [torch.full(shape, float(world.rank + number)) for number, shape in enumerate(shapes)]
    tensors.append(torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last) * (world.rank + 1))
    tensors += [torch.full((9,), float(world.rank), dtype=torch.float64), torch.arange(8.0)[::2] * world.rank]
    with TensorMemory() as memory:
        memory.add(tensors)
        world.average(tensors, bucket=2**21)
    size = sum(t.nbytes for t in tensors)
    return {"tensors": tensors, "peak": memory.peak - size, "bytes": size}


def network():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        # One output: a bias of which the second process holds nothing.
        return nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 1))


def optimizer_of(network, **options):
    average = copy.deepcopy(network)
    if options.pop("mesh", None) is not None:
        for each in (network, average):
            fully_shard(each, reshard_after_forward=True)
    ema = list(average.parameters())
    return FusedAdamW(network.parameters(), lr=0.01, ema=ema, ema_decay=0.5, max_grad_norm=1e-3, **options), ema


def optimize(world, bits=32, poisoned=None, steps=3):
    """Steps of a sharded network on this process's half of the batch; `poisoned`: whose shard of a gradient is not
    finite in the second one."""
    model = network()
    optimizer, ema = optimizer_of(model, mesh=True, state_bits=bits)
    samples = torch.randn(8, 96, generator=torch.Generator().manual_seed(4))[world.rank * 4 :][:4]
    for step in range(steps):
        model(samples).square().mean().backward()
        if step == 1 and world.rank == poisoned:
            local(next(model.parameters()).grad)[0, 0] = math.inf
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()["state"]
    return {
        "params": [whole(p) for p in model.parameters()],
        "ema": [whole(p) for p in ema],
        "exp_avg": [whole(each["exp_avg"]) for each in state.values()],
        "exp_avg_sq": [whole(each["exp_avg_sq"]) for each in state.values()],
        "step": [each["step"] for each in state.values()],
        "skipped": optimizer.skipped,
        "norm": optimizer.grad_norm,
    }


def save_on_a_full_disk(world, folder):
    """What every process says of a checkpoint that the second one has no room for, and what is there afterwards."""
    made = trainer(world, folder=folder, batch_size=2, sharding="full")
    made.iterate()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    kept, os.fsync = os.fsync, full if world.rank == 1 else os.fsync
    try:
        made.save()
    except CheckpointError as error:
        return str(error), sorted(path.name for path in Path(folder).iterdir())
    finally:
        os.fsync = kept


def resumed_error(world, folder):
    """What every process says of a folder whose checkpoints are damaged."""
    made = trainer(world, folder=folder, batch_size=2, sharding="full")
    try:
        made.resume()
    except CheckpointError as error:
        return str(error)


def refused(world):
    """What is said of a student whose blocks are not known."""
    teacher, schedule = gaussian_teacher()
    config = changed(DMDConfig(regression_weight=0), trainer={"sharding": "full"})
    try:
        method = DMD(teacher, schedule, "sample", config)
        Trainer(method, PromptData(CONDITIONS, (2,)), config.trainer, role_configs(config), world=world)
    except ValueError as error:
        return str(error)
