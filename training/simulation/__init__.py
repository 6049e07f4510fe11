"""A training run without computing: fake networks, batches and turns, and the memory that they would take."""

from .data import PlannedImages, planned_images
from .fakes import fake_mode
from .run import simulate
from .teacher import PlannedTeacher, copy_of, teacher_of

__all__ = ["PlannedImages", "PlannedTeacher", "copy_of", "fake_mode", "planned_images", "simulate", "teacher_of"]
