"""Random scores."""

from evoprune.metrics.criterion import CRITERIA, RandomCriterion

CRITERIA.add("random", RandomCriterion())
