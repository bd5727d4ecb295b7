"""Metrics inside the tools of others: each module names one, and needs it when it is used, not when it is imported."""
