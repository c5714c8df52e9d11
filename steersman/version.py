"""The one version number: of the package, and of what wrote a file."""

__version__ = "0.1.0"
"""The version of the package."""
