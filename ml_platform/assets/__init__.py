"""The assets, one module per asset, all partitioned by raw file."""

import warnings

import dagster as dg

# Dagster's version is pinned, so its beta and preview APIs are safe to use; silence the warning on each command.
warnings.filterwarnings("ignore", category=dg.BetaWarning)
warnings.filterwarnings("ignore", category=dg.PreviewWarning)
