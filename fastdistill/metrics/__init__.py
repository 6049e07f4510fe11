"""How good generated samples are, and how sure one can be of it: docs/metrics.md says what each figure can show."""

from fastdistill.losses import straightness

from .accuracy import classifier_accuracy
from .clip import clip_score, clip_similarities
from .diversity import diversity
from .frechet import FrechetStatistics, frechet_distance
from .inception import fid, inception_features, inception_statistics
from .neighbours import PrecisionRecall, precision_recall
from .wasserstein import sliced_wasserstein

__all__ = [
    "FrechetStatistics",
    "PrecisionRecall",
    "classifier_accuracy",
    "clip_score",
    "clip_similarities",
    "diversity",
    "fid",
    "frechet_distance",
    "inception_features",
    "inception_statistics",
    "precision_recall",
    "sliced_wasserstein",
    "straightness",
]
