"""Reports: tables, plots, and HTML pages of both."""
