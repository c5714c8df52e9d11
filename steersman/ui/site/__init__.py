"""A static site of an SAE's features, which opens from disk and from any web server."""

from steersman.ui.site.table import ScoreColumn
from steersman.ui.site.write import check_site, write_site

__all__ = ["ScoreColumn", "check_site", "write_site"]
