"""Version of the installed platform, which only pyproject.toml states."""

from importlib.metadata import version

PLATFORM_VERSION = version("ml-platform")
