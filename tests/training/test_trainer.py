"""The loop: counting, accumulation, resuming to the bit, signals, updates that are left out."""

import dataclasses
import os
import signal

import pytest
import torch
from fastdistill.training import (
    DMD,
    CheckpointError,
    Diverged,
    DMDConfig,
    GradientContractError,
    Losses,
    Method,
    PromptData,
    RoleConfig,
    Trainer,
    TrainerConfig,
    Turn,
)
from fastdistill.training.config import role_configs
from fastdistill.training.settings import changed
from torch import nn

from .toys import CONDITIONS, gaussian_teacher

CONFIG = TrainerConfig(updates=6, batch_size=8, report_every=1)
ADAM = RoleConfig(learning_rate=0.01, warm_up=2, decay=0.5)


class Pursuit(Method):
    """A student that runs to where a critic is, and a critic that runs to where the student was; with dropout."""

    name = "pursuit"

    def __init__(self, every=2):
        torch.manual_seed(0)
        self.roles = {"student": _network(), "critic": _network(), "teacher": _network().eval()}
        self.turns = (Turn("student", every), Turn("critic"))
        self.seen = []

    def losses(self, role, step):
        self.seen.append(role)
        x = self.roles["student"](step.batch["noise"])
        if role == "student":
            target = self.roles["critic"](step.draws.randn(2)) + self.roles["teacher"](x)
            return Losses({"near": (x - target).square().mean(), "small": 0.1 * x.square().mean()})
        return Losses({"follow": (self.roles["critic"](step.draws.randn(2)) - x.detach()).square().mean()})


def _network():
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))


def trainer(method=None, config=CONFIG, folder=None):
    method = method or Pursuit()
    roles = {turn.role: ADAM for turn in method.turns}
    return Trainer(method, PromptData(CONDITIONS, (2,)), config, roles, folder=folder)


def weights(trainer):
    networks = [*trainer.method.roles.values(), trainer.average.network]
    return [value.clone() for network in networks for value in network.state_dict().values()]


def same(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_roles_are_updated_in_their_ratio_whatever_the_accumulation(every, accumulation):
    method = Pursuit(every)
    run = trainer(method, dataclasses.replace(CONFIG, accumulation=accumulation)).run()
    assert run.updates == {"student": 6, "critic": 6 * every}
    contract_check = 5  # names of the terms of two turns, then each of three terms
    assert len(method.seen) - contract_check == accumulation * (6 + 6 * every)


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch():
    class Mean(Method):
        name = "mean"

        def __init__(self):
            torch.manual_seed(0)
            self.roles = {"student": nn.Linear(2, 1)}
            self.turns = (Turn("student"),)

        def losses(self, role, step):
            return Losses({"loss": self.roles["student"](step.batch["noise"]).square().mean()})

    class Halves:
        def __init__(self, samples):
            self.samples = samples

        def batch(self, first, draws):
            return {"noise": self.samples[first : first + draws.batch_size]}

    samples = torch.randn(48, 2, generator=torch.Generator().manual_seed(1))
    results = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        method = Mean()
        config = dataclasses.replace(CONFIG, batch_size=batch_size, accumulation=accumulation)
        Trainer(method, Halves(samples), config, {"student": ADAM}).run()
        results.append(method.roles["student"].weight.detach())
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stop", range(1, 6))
def test_a_run_stopped_at_any_update_and_resumed_equals_the_uninterrupted_one_bit_for_bit(tmp_path, stop, accumulation):
    config = dataclasses.replace(CONFIG, accumulation=accumulation)
    torch.manual_seed(7)
    whole = trainer(config=config)
    whole.run()
    torch.manual_seed(7)
    trainer(config=config, folder=tmp_path).run(lambda progress: progress.update == stop)
    torch.manual_seed(99)  # dropout draws from the global generator, which is restored
    resumed = trainer(config=config, folder=tmp_path)
    assert resumed.resume() == stop
    run = resumed.run()
    assert same(weights(resumed), weights(whole))
    assert run.updates == {"student": 6, "critic": 12}
    assert same(*(list(_tensors(t.state())) for t in (resumed, whole)))


def _tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)


@pytest.mark.parametrize("stop", range(1, 6))
def test_under_autocast_with_validation_and_the_best_delivered_it_resumes_to_the_bit_too(tmp_path, stop):
    config = dataclasses.replace(CONFIG, precision="bfloat16", accumulation=2, validate_every=1, deliver="best")

    def distance(student):
        return {"distance": float((student[0].weight.sum() - 0.5).abs())}

    def made(folder=None):
        return Trainer(Pursuit(), PromptData(CONDITIONS, (2,)), config, roles, folder=folder, validate=distance)

    roles = {"student": ADAM, "critic": ADAM}
    torch.manual_seed(7)
    whole = made().run()
    torch.manual_seed(7)
    made(tmp_path).run(lambda progress: progress.update == stop)
    torch.manual_seed(99)
    resumed = made(tmp_path)
    assert resumed.resume() == stop
    run = resumed.run()
    assert same(run.student.state_dict().values(), whole.student.state_dict().values())
    assert (run.best, run.validation, run.losses) == (whole.best, whole.validation, whole.losses)


def test_dmd_resumes_to_the_bit(tmp_path):
    config = changed(
        DMDConfig(regression_weight=0),
        trainer={"updates": 6, "batch_size": 16, "report_every": 1},
        student={"warm_up": 2},
    )

    def dmd(folder=None):
        teacher, schedule = gaussian_teacher()
        method = DMD(teacher, schedule, "sample", config)
        return Trainer(method, PromptData(CONDITIONS, (2,)), config.trainer, role_configs(config), folder=folder)

    whole = dmd()
    whole.run()
    dmd(tmp_path).run(lambda progress: progress.update == 3)
    resumed = dmd(tmp_path)
    resumed.resume()
    resumed.run()
    assert same(weights(resumed), weights(whole))


def test_checkpoints_are_made_every_so_many_updates_and_at_the_end(tmp_path):
    config = dataclasses.replace(CONFIG, updates=7, checkpoint_every=2, keep_checkpoints=10)
    trainer(config=config, folder=tmp_path).run()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{n:08d}" for n in (4, 8, 12, 14)]


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path):
    trainer(folder=tmp_path).run()
    other = trainer(config=dataclasses.replace(CONFIG, seed=1), folder=tmp_path)
    before = weights(other)
    with pytest.raises(CheckpointError, match=r"another run: config\.seed is 0 in the checkpoint and 1 here"):
        other.resume()
    assert same(weights(other), before)
    method = Pursuit()
    method.name = "chase"
    method.roles["critic"] = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"method is 'pursuit' .* 'chase' here; networks\.critic\.class is"):
        trainer(method, folder=tmp_path).resume()


def test_another_architecture_of_the_same_size_is_refused_by_the_tensors_that_differ_and_changes_nothing(tmp_path):
    def made(*sizes):
        method = Pursuit()
        method.roles["critic"] = nn.Sequential(*(nn.Linear(2, 2 * size) for size in sizes), nn.Linear(2, 2))
        method.losses = lambda role, step: Losses(
            {role: sum(layer(step.batch["noise"]).square().mean() for layer in method.roles[role])}
        )
        method.roles["student"] = nn.Sequential(nn.Linear(2, 2))
        return trainer(method, folder=tmp_path)

    made(1, 2).run()
    other = made(2, 1)
    before = weights(other)
    with pytest.raises(CheckpointError, match=r"critic\.0\.bias is \[2\] in the checkpoint and \[4\] here"):
        other.resume()
    assert same(weights(other), before)


@pytest.mark.parametrize(
    ("role", "settings", "every", "message"),
    [
        (ADAM, {"guidance": 2.0}, 2, r"settings\.guidance is 1\.0 in the checkpoint and 2\.0 here"),
        (ADAM, {"guidance": 1.0}, 3, r"turns\.student is 2 in the checkpoint and 3 here"),
        (dataclasses.replace(ADAM, beta1=0.5), {"guidance": 1.0}, 2, r"student\.beta1 is 0\.9 .* 0\.5 here"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_with_the_difference(tmp_path, role, settings, every, message):
    def made(role, settings, every):
        roles = {"student": role, "critic": ADAM}
        return Trainer(Pursuit(every), PromptData(CONDITIONS, (2,)), CONFIG, roles, folder=tmp_path, settings=settings)

    made(ADAM, {"guidance": 1.0}, 2).run()
    slower = made(dataclasses.replace(ADAM, learning_rate=0.001), {"guidance": 1.0}, 2)
    assert slower.resume() == 6
    assert slower.updaters["student"].learning_rate == 0.001
    with pytest.raises(CheckpointError, match=message):
        made(role, settings, every).resume()


def test_a_new_run_does_not_mix_its_checkpoints_with_those_that_are_there(tmp_path):
    trainer(folder=tmp_path).run()
    with pytest.raises(CheckpointError, match="holds checkpoints; needed resume, or another folder"):
        trainer(config=dataclasses.replace(CONFIG, seed=1), folder=tmp_path).run()


def test_two_runs_in_one_folder_at_once_are_refused_and_the_first_goes_on(tmp_path):
    refused = []

    def another(progress):
        second = trainer(folder=tmp_path)
        second.resume()
        with pytest.raises(BlockingIOError, match=rf"another process \({os.getpid()}\) is at work in it"):
            second.run()
        refused.append(progress.update)

    config = dataclasses.replace(CONFIG, checkpoint_every=1)
    assert trainer(config=config, folder=tmp_path).run(another).ended == "finished"
    assert len(refused) == 6


def test_what_a_resumed_run_reports_is_what_the_uninterrupted_one_reports(tmp_path):
    """Losses and gradient norms of roles whose last turn was before the stop, too."""

    class Rare(Pursuit):
        def __init__(self):
            super().__init__(every=1)
            self.turns = (Turn("student"), Turn("critic", 4))

    def figures(progress):
        reports.append((progress.update, progress.losses, progress.gradient_norms, progress.learning_rates))
        return len(reports) == 5

    config = dataclasses.replace(CONFIG, updates=7)
    reports = []
    trainer(Rare(), config, tmp_path / "whole").run(lambda progress: figures(progress) and False)
    whole, reports = reports, []
    trainer(Rare(), config, tmp_path / "stopped").run(figures)
    resumed = trainer(Rare(), config, tmp_path / "stopped")
    resumed.resume()
    run = resumed.run(lambda progress: figures(progress) and False)
    assert reports == whole
    again = trainer(Rare(), config, tmp_path / "stopped")
    again.resume()
    assert again.run().losses == run.losses


def test_the_contract_is_checked_at_a_resume_too_where_a_hinge_may_have_nothing_left_to_say(tmp_path):
    class Hinge(Pursuit):
        margin = 1e3  # nothing judged is as large: there is a gradient

        def losses(self, role, step):
            if role == "student":
                return super().losses(role, step)
            return Losses({"hinge": torch.relu(self.margin - self.roles[self.judge](step.draws.randn(2))).mean()})

        judge = "critic"

    trainer(Hinge(), folder=tmp_path).run(lambda progress: progress.update == 2)
    method = Hinge()
    method.margin = -1e3
    with pytest.raises(GradientContractError, match="its gradient is zero"):
        trainer(method).run()
    resumed = trainer(method, folder=tmp_path)
    resumed.resume()
    assert resumed.run().updates["student"] == 6
    method.judge = "student"
    miswired = trainer(method, dataclasses.replace(CONFIG, updates=9), tmp_path)
    miswired.resume()
    with pytest.raises(GradientContractError, match="'hinge' gives no gradient to anything, 'critic' included"):
        miswired.run()


def test_a_longer_run_may_resume_a_shorter_one(tmp_path):
    trainer(folder=tmp_path).run()
    longer = trainer(config=dataclasses.replace(CONFIG, updates=9), folder=tmp_path)
    assert longer.resume() == 6
    assert longer.run().updates["student"] == 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_update_with_a_checkpoint(tmp_path, number):
    def kill(progress):
        if progress.update == 3:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    run = trainer(folder=tmp_path).run(kill)
    assert run.ended == signal.Signals(number).name
    assert run.updates["student"] == 3
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000006"]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["begin", "loss", "validation", "save", "last save", "end of all saves"])
def test_signals_that_come_at_any_moment_and_more_than_once_wait_for_a_checkpoint(
    tmp_path, monkeypatch, moment, number
):
    config = dataclasses.replace(CONFIG, checkpoint_every=1, validate_every=3, keep_checkpoints=10)
    whole = trainer(config=config)
    whole.run()

    def twice(*given):
        for _ in range(3):
            os.kill(os.getpid(), number)
        return {"distance": 1.0}

    class Begins:
        begin = twice if moment == "begin" else None

        def __call__(self, progress):
            pass

    class Interrupted(Pursuit):
        def losses(self, role, step):
            if moment == "loss" and len(self.seen) == 12:
                twice()
            return super().losses(role, step)

    saves = {"save": 2, "last save": 6, "end of all saves": 7}.get(moment)
    original, steps = os.replace, []

    def replace(*given):
        steps.append(given[1])
        if len(steps) == saves:
            twice()
        original(*given)

    monkeypatch.setattr(os, "replace", replace)
    first = Trainer(
        Interrupted(),
        PromptData(CONDITIONS, (2,)),
        config,
        {"student": ADAM, "critic": ADAM},
        folder=tmp_path,
        validate=twice if moment == "validation" else None,
    )
    run = first.run(Begins())
    monkeypatch.undo()
    assert run.ended == ("finished" if moment == "end of all saves" else signal.Signals(number).name)
    update = {"begin": 0, "loss": 3, "validation": 3, "save": 2}.get(moment, 6)
    assert run.updates["student"] == update
    resumed = trainer(config=config, folder=tmp_path)
    assert resumed.resume() == update
    assert resumed.run().ended == "finished"
    assert same(weights(resumed), weights(whole))


class Poisoned(Pursuit):
    """Not finite in the student's turns of the given iterations."""

    def __init__(self, bad):
        super().__init__(every=1)
        self.bad, self.turns_taken = bad, 0

    def losses(self, role, step):
        losses = super().losses(role, step)
        if role == "student":
            self.turns_taken += 1
            if self.turns_taken - 3 in self.bad:  # behind the contract check
                losses.terms["near"] = losses.terms["near"] * float("nan")
        return losses


def test_an_update_that_is_not_finite_is_left_out_and_the_others_go_on():
    run = trainer(Poisoned(bad=(2, 3)))
    seen = []
    run.run(lambda progress: seen.append((progress.updates["student"], progress.skipped["student"])))
    assert seen == [(1, 0), (1, 1), (1, 2), (2, 2), (3, 2), (4, 2)]
    assert all(bool(value.isfinite().all()) for value in weights(run) if value.is_floating_point())


def test_too_many_of_them_end_the_run_with_the_state_of_before_saved(tmp_path):
    config = dataclasses.replace(CONFIG, most_skipped=2)
    poisoned = trainer(Poisoned(bad=range(3, 99)), config, tmp_path)
    with pytest.raises(Diverged, match=r"student: 3 updates were left out .*most_skipped 2"):
        poisoned.run()
    good = trainer(Poisoned(bad=()), config)
    good.run(lambda progress: progress.update == 2)
    found = trainer(Poisoned(bad=()), config, tmp_path)
    assert found.resume() == 5
    average = found.average.network.state_dict()
    assert all(torch.equal(value, average[name]) for name, value in good.average.network.state_dict().items())


def test_the_contract_check_leaves_no_trace():
    checked = trainer()
    before, state = weights(checked), torch.get_rng_state()
    checked._check_contract()
    assert same(weights(checked), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_roles_without_a_configuration_are_named():
    with pytest.raises(
        ValueError, match=r"roles: configured are \['student'\]; pursuit trains \['critic', 'student'\]"
    ):
        Trainer(Pursuit(), PromptData(CONDITIONS, (2,)), CONFIG, {"student": ADAM})


def validated(config, folder=None):
    """A run whose validation gives 5, 3, 4: the second is the best. What it saw, the trainer and the run."""
    seen, figures = [], iter([5.0, 3.0, 4.0])

    def validate(student):
        assert not student.training
        torch.rand(3)  # must not change the run
        seen.append([p.clone() for p in student.parameters()])
        return {"distance": next(figures), "accuracy": 1.0}

    method = Pursuit()
    roles = {turn.role: ADAM for turn in method.turns}
    made = Trainer(method, PromptData(CONDITIONS, (2,)), config, roles, folder=folder, validate=validate)
    reports = []
    return seen, made, made.run(reports.append), reports


def test_validation_sees_the_average_every_so_many_updates_and_changes_nothing():
    seen, made, run, reports = validated(dataclasses.replace(CONFIG, validate_every=2))
    plain = trainer()
    plain.run()
    assert len(seen) == 3
    assert same(weights(made), weights(plain))
    assert (run.best, run.validation) == (4, {"distance": 4.0, "accuracy": 1.0})
    assert [(r.validated, r.best) for r in reports] == [(None, None), (2, 2), (2, 2), (4, 4), (4, 4), (6, 4)]


@pytest.mark.parametrize(("deliver", "index"), [("last", 2), ("best", 1)])
def test_the_best_or_the_last_average_is_delivered(deliver, index):
    seen, _, run, _ = validated(dataclasses.replace(CONFIG, validate_every=2, deliver=deliver))
    assert same(run.student.parameters(), seen[index])


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    config = dataclasses.replace(CONFIG, validate_every=2, checkpoint_every=1, keep_checkpoints=1)
    validated(config, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000008", "step-00000012"]


def test_the_best_average_survives_a_stop(tmp_path):
    config = dataclasses.replace(CONFIG, validate_every=2, deliver="best")
    seen, *_ = validated(config, tmp_path)
    resumed = trainer(config=config, folder=tmp_path)
    resumed.resume()
    assert same(resumed.run().student.parameters(), seen[1])


def test_progress_tells_learning_rates_and_gradient_norms_of_every_role():
    reports = []
    trainer().run(reports.append)
    assert reports[0].learning_rates == pytest.approx({"student": 0.01 * 2 / 3, "critic": 0.01})
    assert all(norm > 0 for norm in reports[-1].gradient_norms.values())
    assert reports[0].stage == "pursuit"


def test_autocast_reaches_the_networks_and_leaves_weights_and_losses_float32():
    dtypes = []

    class Seeing(Pursuit):
        def losses(self, role, step):
            dtypes.append(self.roles["student"](step.batch["noise"]).dtype)
            return super().losses(role, step)

    made = trainer(Seeing(), dataclasses.replace(CONFIG, precision="bfloat16"))
    made.run()
    assert set(dtypes) == {torch.bfloat16}
    assert {p.dtype for p in made.method.roles["student"].parameters()} == {torch.float32}
