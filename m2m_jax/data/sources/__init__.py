"""Data sources, one a module: every module here is imported when `config.data.name` is looked up."""
