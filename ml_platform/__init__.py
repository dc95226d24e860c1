"""A Dagster platform that keeps a fraud model fresh as raw transaction files arrive."""

import atexit
import gc

# The libraries make hundreds of thousands of objects that stay. By default Python looks for garbage among them after
# every 700 new ones, and among all of them when the process ends: a third of the time of a short command.
gc.set_threshold(10_000, 10, 10)
atexit.register(gc.freeze)
