"""Weight magnitude. Its published scope is the whole matrix."""

from evoprune.metrics.criterion import CRITERIA, Metric

CRITERIA.add("magnitude", Metric.from_text("abs(W)", "layer", "Han et al. 2015, arXiv:1506.02626"))
