"""Reports of a run that never was."""

from fastdistill.training import Method, TrainingProgress
from fastdistill.training.pipelines import one_step_scheduler


class Drawn(Method):
    """A method of which only the sampling is asked."""

    name = "drawn"
    start = 999

    def losses(self, role, step):
        raise NotImplementedError

    def scheduler(self, teacher_scheduler):
        return one_step_scheduler(teacher_scheduler, self.start)


def a_report(update, stage="reflow", total=100, student=None, **changes):
    figures = {
        "losses": {"flow": 1.0 / update if update else 1.0},
        "updates": {"student": update},
        "skipped": {"student": 0},
        "learning_rates": {"student": 1e-4},
        "gradient_norms": {"student": 0.5},
    }
    given = figures | changes
    return TrainingProgress(stage, update, total, 2.0 * update, student=student, method=Drawn(), **given)
