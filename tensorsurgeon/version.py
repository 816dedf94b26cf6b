"""The package version, alone in a module so that planning can name it without importing the package's face."""

__version__ = "0.1.0"
