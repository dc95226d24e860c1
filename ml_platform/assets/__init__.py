"""The assets, one module per asset, all partitioned by raw file."""

import warnings

import dagster as dg

# We use these on purpose and pin Dagster's version; each command would print them.
warnings.filterwarnings("ignore", category=dg.BetaWarning)
warnings.filterwarnings("ignore", category=dg.PreviewWarning)
